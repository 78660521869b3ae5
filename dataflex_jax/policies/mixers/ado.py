"""ADO: sample the domains from which the model still learns the most, by scaling laws fitted to their training losses.

Jiang et al. 2024, "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws", arXiv 2410.11820. It needs
no model pass of its own: what a domain's loss will do is read off the losses that training gives anyway.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.policies import Mixer, Observation, options, register_mixer
from dataflex_jax.policies.common import scaling_law
from dataflex_jax.policies.common.loss_history import LossHistory
from dataflex_jax.policies.proportions import Proportions, all_positive, only, starting_proportions

STEP_SIZES = ("same", "own")
_LEAST_EXPONENT = 0.05
_LEAST_PROBABILITY = 0.01
_DRAWN_DECAY = 0.9
_LEAST_POINTS = 8


class AdoState(NamedTuple):
    """The policy, the scaling laws and what they are fitted to.

    Attributes:
        prior: float32 [K], mu, a distribution.
        weights: float32 [K], what is sampled from.
        average: float32 [K], running mean of rho.
        drawn: float32 [K], h, moving average of each domain's share of the rows.
        samples: int32 [K], n, rows so far: of the domain, or of all domains.
        law: float32 [K, 3], (a, e, b) of each domain's scaling law; 0 before the first fit.
        fitted: whether the domain has a scaling law.
        history: losses against n.
    """

    prior: Float[Array, " K"]
    weights: Float[Array, " K"]
    average: Float[Array, " K"]
    drawn: Float[Array, " K"]
    samples: Int[Array, " K"]
    law: Float[Array, "K 3"]
    fitted: Bool[Array, " K"]
    history: LossHistory


@register_mixer("ado")
def ado(
    *,
    step_size: str = "same",
    ignore: int = 100,
    smoothing: int = 10,
    history: int = 256,
    prior: Proportions = None,
) -> Mixer:
    """Samples a domain more often the faster its loss is about to fall.

    At each scheduled update a law `L_i(n) = exp(e_i) + exp(a_i) n^(-b_i)` is fitted to the losses of domain i so far
    (see `scaling_law.fit`); a fit that is not finite leaves the last one. After each step t, once every domain has its
    law,

        slope_i = max(b_i, 0.05) (L_i(n_i) - exp(e_i)) / n_i
        rho ~ slope * mu * sqrt(h),   made >= 0.01 and normalised
        w = 0.9 average + 0.1 rho,   average <- average + (rho - average) / (t + 1)

    where mu is the prior, h the moving average (0.9) of the domains' shares of the rows that were drawn, and w is
    sampled from. Before that, w is the prior. A fit takes 8 points at least, so that nothing happens before
    `ignore + 8 smoothing` steps. A domain that the run has at proportion 0 has no prior, needs no law and has rho 0.

    Args:
        step_size: what n counts: rows of all domains ("same", the authors' default) or the domain's "own".
        ignore: first steps of the run that are not fitted, >= 0: the losses of the learning rate's warm-up follow no
            law. The authors take 1000 of 60,000.
        smoothing: steps that a point averages over, >= 1; where the history is full, points are averaged in pairs and
            this doubles. It stands for the authors' Savitzky-Golay filter over 101 steps.
        history: points of the history at most, even and >= 16.
        prior: K weights or "uniform"; None: the run's proportions.

    Raises:
        ValueError: a hyperparameter out of its range; from `init`, a domain without prior.
    """
    options.one_of("step_size", step_size, STEP_SIZES)
    options.at_least("ignore", ignore, 0)
    options.at_least("smoothing", smoothing, 1)
    options.require("history", history, 16 <= history <= 2**20 and history % 2 == 0, "even, >= 16 and <= 2**20")

    def init(natural: Float[Array, " K"]) -> AdoState:
        mu = starting_proportions("prior", prior, natural)
        all_positive("prior", prior, mu, natural)
        num_domains = mu.shape[0]
        return AdoState(
            prior=mu,
            weights=mu,
            average=mu,
            drawn=mu,
            samples=jnp.zeros((num_domains,), jnp.int32),
            law=jnp.zeros((num_domains, 3), jnp.float32),
            fitted=jnp.zeros((num_domains,), bool),
            history=LossHistory.empty(num_domains, history, smoothing),
        )

    def update(state: AdoState, observation: Observation) -> AdoState:
        rows = observation.domain_rows
        samples = state.samples + (jnp.sum(rows) if step_size == "same" else rows)
        drawn = _DRAWN_DECAY * state.drawn + (1 - _DRAWN_DECAY) * rows / jnp.maximum(jnp.sum(rows), 1)
        seen = state.history.add(observation.domain_loss, rows, samples, observation.step > ignore)
        rho = preference(state.law, samples, state.prior, drawn)
        weights, average = mixed(rho, state.average, observation.step)
        active = jnp.all(state.fitted | (state.prior <= 0))
        return state._replace(
            weights=jnp.where(active, weights, state.weights),
            average=jnp.where(active, average, state.average),
            drawn=drawn,
            samples=samples,
            history=seen,
        )

    def on_resume(old: AdoState, fresh: AdoState) -> AdoState:
        """All goes on with the new prior; with a further domain, w stays until it has a scaling law."""
        # What had no prior is as a further domain.
        kept = jnp.any(old.fitted) & (old.prior > 0)
        weights = only(jnp.where(kept, old.weights, fresh.weights), fresh.prior > 0)
        average = only(jnp.where(kept, old.average, fresh.average), fresh.prior > 0)
        return old._replace(
            prior=fresh.prior,
            weights=weights / jnp.sum(weights),
            average=average / jnp.sum(average),
            drawn=old.drawn / jnp.sum(old.drawn),
        )

    return Mixer(
        init=init,
        update=update,
        sampling_weights=lambda state: state.weights,
        on_resume=on_resume,
        refresh=lambda state, signals: refitted(state),
        log=described,
    )


def described(state: AdoState) -> dict[str, Any]:
    """The state as policy.jsonl holds it: the laws by their parameters, no losses."""
    law = dict(zip("aeb", state.law.T, strict=True))
    history = {name: getattr(state.history, name) for name in ("filled", "steps", "block")}
    return {**state._asdict(), "law": law, "history": history}


@jax.jit
def refitted(state: AdoState) -> AdoState:
    """The state with the scaling laws of the losses so far; with too few points or no finite fit the last one stays."""
    samples, losses, counts = state.history.points()
    law = jax.vmap(scaling_law.fit)(samples, losses, counts)
    enough = jnp.sum(counts > 0, axis=1) >= _LEAST_POINTS
    good = enough & jnp.all(jnp.isfinite(law), axis=1)
    return state._replace(law=jnp.where(good[:, None], law, state.law), fitted=state.fitted | good)


def preference(
    law: Float[Array, "K 3"], samples: Int[Array, " K"], prior: Float[Array, " K"], drawn: Float[Array, " K"]
) -> Float[Array, " K"]:
    """rho: how fast each domain's loss falls with another sample of it, times prior and root of the shares drawn."""
    n = jnp.maximum(samples, 1).astype(jnp.float32)
    a, _, b = law.T
    slope = jnp.maximum(b, _LEAST_EXPONENT) * jnp.exp(a - b * jnp.log(n)) / n
    rho = slope * prior * jnp.sqrt(drawn)
    rho = jnp.where(prior > 0, jnp.maximum(rho / jnp.sum(rho), _LEAST_PROBABILITY), 0.0)
    return rho / jnp.sum(rho)


def mixed(
    rho: Float[Array, " K"], average: Float[Array, " K"], step: Int[Array, ""]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """(w, the next average) of step `step`."""
    return 0.9 * average + 0.1 * rho, average + (rho - average) / (step + 1)
