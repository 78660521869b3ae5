"""DoGE: sample the domains whose gradients help the others, or a target set.

Fan et al. 2023, "DoGE: Domain Reweighting with Generalization Estimation", arXiv 2310.15393; with a target set and a
moving average: Fan et al. 2024, "Dynamic Gradient Alignment for Online Data Mixing", arXiv 2410.02498.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.policies import TARGETS, DomainGradients, Mixer, Signals, options, register_mixer
from dataflex_jax.policies.proportions import Proportions, starting_proportions

TOWARDS = ("others", "targets")


class DogeState(NamedTuple):
    """The weights after the last update.

    Attributes:
        weights: float32 [K], the iterate of mirror descent.
        smoothed: float32 [K], its moving average, which is sampled from.
        weights_sum: float32 [K], sum of `weights` over the updates.
        score: float32 [K], s of the last update; 0 before any.
        count: updates so far.
    """

    weights: Float[Array, " K"]
    smoothed: Float[Array, " K"]
    weights_sum: Float[Array, " K"]
    score: Float[Array, " K"]
    count: Int[Array, ""]


def average(state: DogeState) -> Float[Array, " K"]:
    """Mean of the weights over the updates, which the paper trains its final model with; the weights before any."""
    weights = jnp.where(state.count > 0, state.weights_sum, state.weights)
    return weights / jnp.sum(weights)


@register_mixer("doge")
def doge(
    *,
    mu: float = 0.01,
    c: float = 0.0,
    clip: float = 5.0,
    targets: str = "others",
    ema: float = 0.0,
    initial_proportions: Proportions = None,
) -> Mixer:
    """Samples a domain more often the better its gradient g_i agrees with those of what shall improve.

    At each scheduled update, with the coming step's learning rate lr,

        s_i = clip(lr <g_i, sum of the target gradients> / mean_j ||g_j||, 0, clip * lr)
        w <- softmax(log w + s / mu),   w <- (1 - c) w + c / K

    and what is sampled from is `smoothed <- ema * smoothed + (1 - ema) w`.

    Args:
        mu: strength of the Bregman divergence to the last w, > 0; the smaller, the larger the steps.
        c: share of the uniform distribution in w, in [0, 1].
        clip: bound of s as a multiple of lr, > 0.
        targets: "others": the target gradients are those of all other domains. "targets": that of the run's target set.
        ema: share of the old average in what is sampled from, in [0, 1); 0: w itself (DoGE).
        initial_proportions: K weights or "uniform" to start from; None: the run's proportions.

    Raises:
        ValueError: a hyperparameter out of its range.
        InputError: from `refresh`, targets="targets" without a target set.
    """
    options.positive("mu", mu)
    options.between("c", c, 0, 1)
    options.positive("clip", clip)
    options.one_of("targets", targets, TOWARDS)
    options.between("ema", ema, 0, 1, open_high=True)

    def init(natural: Float[Array, " K"]) -> DogeState:
        weights = starting_proportions("initial_proportions", initial_proportions, natural)
        zeros = jnp.zeros_like(weights)
        return DogeState(weights, smoothed=weights, weights_sum=zeros, score=zeros, count=jnp.int32(0))

    @jax.jit
    def moved(state: DogeState, gradients: DomainGradients) -> DogeState:
        squared_norms = jnp.diagonal(gradients.gram)
        others = jnp.sum(gradients.gram, axis=1) - squared_norms
        agreement = others if targets == "others" else gradients.target
        norm = jnp.mean(jnp.sqrt(squared_norms))
        lr = gradients.learning_rate
        score = jnp.clip(lr * agreement / jnp.maximum(norm, 1e-20), 0.0, clip * lr)
        weights = jax.nn.softmax(jnp.log(state.weights) + score / mu)
        weights = (1 - c) * weights + c / weights.shape[0]
        smoothed = ema * state.smoothed + (1 - ema) * weights
        return DogeState(weights, smoothed, state.weights_sum + weights, score, state.count + 1)

    def refresh(state: DogeState, signals: Signals) -> DogeState:
        gradients = signals.domain_gradients()
        if targets == "targets" and gradients.target is None:
            raise InputError("mixer 'doge' needs a target set where targets = 'targets'")
        return moved(state, gradients)

    def on_resume(old: DogeState, fresh: DogeState) -> DogeState:
        # From a weight of 0 no gradient would lead away.
        kept = (old.count > 0) & (old.weights > 0)
        weights = jnp.where(kept, old.weights, fresh.weights)
        smoothed = jnp.where(kept, old.smoothed, fresh.smoothed)
        return old._replace(weights=weights / jnp.sum(weights), smoothed=smoothed / jnp.sum(smoothed))

    return Mixer(
        init=init,
        update=lambda state, observation: state,
        sampling_weights=lambda state: state.smoothed,
        average=average,
        on_resume=on_resume,
        refresh=refresh,
        needs=frozenset({TARGETS} if targets == "targets" else ()),
    )
