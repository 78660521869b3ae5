"""DoReMi: weigh the domains by how far a proxy model is above a reference model on them.

Xie et al. 2023, "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", arXiv 2305.10429, algorithm 1.
Three runs: a reference model on given proportions, the proxy with this mixer, and the target model on what `average`
gives. The proxy's rows come from fixed proportions; it is the loss that the domain weights enter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.policies import Mixer, Observation, options, register_mixer
from dataflex_jax.policies.common.reference import reference_model
from dataflex_jax.policies.proportions import Proportions, all_positive, only, starting_proportions

INITIAL = ("uniform", "sampling")
LOSS_NORMS = ("official", "paper")


class DoremiState(NamedTuple):
    """The domain weights and what they come from.

    Attributes:
        alpha: float32 [K], the domain weights, a distribution.
        lam: float32 [K], each domain's excess loss when it was last seen, in nats a token.
        seen: whether the domain ever had a token.
        alpha_sum: float32 [K], sum of alpha over the updates (and the initial one, where that counts).
        count: how many alphas `alpha_sum` holds.
        sampling: float32 [K], the proportions that rows are drawn with throughout.
    """

    alpha: Float[Array, " K"]
    lam: Float[Array, " K"]
    seen: Bool[Array, " K"]
    alpha_sum: Float[Array, " K"]
    count: Int[Array, ""]
    sampling: Float[Array, " K"]


def average(state: DoremiState) -> Float[Array, " K"]:
    """Mean of alpha over the updates, the proportions for the target model; alpha itself before any."""
    weights = jnp.where(state.count > 0, state.alpha_sum, state.alpha)
    return weights / jnp.sum(weights)


@register_mixer("doremi")
def doremi(
    *,
    reference: str | None = None,
    reference_losses: str = "model",
    eta: float = 1.0,
    c: float = 1e-3,
    sampling: Proportions = None,
    initial: str = "uniform",
    initial_excess: float | None = None,
    loss_norm: str = "official",
    average_includes_initial: bool = False,
) -> Mixer:
    """Raises the loss weight of the domains with the most excess loss over the reference model (group DRO).

    After each step past the warm-up, from the token losses of its global batch,

        lam_i = sum over the tokens of domain i of max(l_tok - l_tok_reference, 0) / number of those tokens
        alpha <- softmax(log alpha + eta lam),   alpha <- (1 - c) alpha + c / K

    A domain without tokens in the batch keeps its last lam. lam is followed during the warm-up too, alpha stays. A
    domain that the run has at proportion 0 has alpha 0.

    The loss of a batch, q the sampling proportions, is

    * "official", the authors' code: the mean over its tokens with weights `alpha_i / q_i` a token of domain i.
    * "paper": `sum_i alpha_i * (token-mean loss of domain i)` over the domains in the batch.

    Args:
        reference: the reference model: a run folder, the folder of one step in it, or a Hugging Face folder or hub id.
        reference_losses: "model": computed in each step; "cached": read from a store that is computed once.
        eta: step size of the exponentiated gradient, > 0.
        c: share of the uniform distribution in alpha, in [0, 1].
        sampling: K weights, "uniform" or "natural" (the run's proportions); None: uniform.
        initial: the first alpha: "uniform" or "sampling".
        initial_excess: lam of a domain before it is seen; the authors take ln(vocabulary size). None: the mean lam of
            the domains seen so far, so that what has not been seen moves neither up nor down. No matter if each domain
            has a row in the first batch.
        loss_norm: one of the above.
        average_includes_initial: whether `average` counts the first alpha (the authors' code) or not (the paper).

    Raises:
        ValueError: a hyperparameter out of its range, no reference; from `init`, a domain that is never sampled.
    """
    options.positive("eta", eta)
    options.between("c", c, 0, 1)
    options.one_of("initial", initial, INITIAL)
    if initial_excess is not None:
        options.at_least("initial_excess", initial_excess, 0)
    options.one_of("loss_norm", loss_norm, LOSS_NORMS)
    model = reference_model(reference, reference_losses)

    def init(natural: Float[Array, " K"]) -> DoremiState:
        chosen = {None: "uniform", "natural": None}.get(sampling, sampling)
        q = starting_proportions("sampling", chosen, natural)
        all_positive("sampling", sampling, q, natural)
        alpha = q if initial == "sampling" else only(jnp.full_like(q, 1 / q.shape[0]), q > 0)
        return DoremiState(
            alpha=alpha,
            lam=jnp.full_like(q, initial_excess or 0.0),
            seen=jnp.zeros(q.shape, bool),
            alpha_sum=alpha if average_includes_initial else jnp.zeros_like(q),
            count=jnp.int32(average_includes_initial),
            sampling=q,
        )

    def update(state: DoremiState, observation: Observation) -> DoremiState:
        num_domains = state.alpha.shape[0]
        excess = jnp.maximum(observation.token_losses - observation.reference_losses, 0.0) * observation.mask
        member = observation.domains[:, None] == jnp.arange(num_domains)
        # A masked sum, not a matrix product, which GPUs would round to TF32.
        total = jnp.sum(member * jnp.sum(excess, axis=1)[:, None], axis=0)
        present = observation.domain_tokens > 0
        lam = jnp.where(present, total / jnp.maximum(observation.domain_tokens, 1.0), state.lam)
        seen = state.seen | present
        assumed = lam
        if initial_excess is None:
            assumed = jnp.where(seen, lam, jnp.sum(lam * seen) / jnp.maximum(jnp.sum(seen), 1))
        alpha = jax.nn.softmax(jnp.log(state.alpha) + eta * assumed)
        alpha = only((1 - c) * alpha + c / num_domains, state.sampling > 0)
        moved = observation.steps_since_warmup > 0
        return DoremiState(
            alpha=jnp.where(moved, alpha, state.alpha),
            lam=lam,
            seen=seen,
            alpha_sum=jnp.where(moved, state.alpha_sum + alpha, state.alpha_sum),
            count=state.count + moved,
            sampling=state.sampling,
        )

    def loss_weights(state: DoremiState) -> Float[Array, " K"]:
        return state.alpha / state.sampling if loss_norm == "official" else state.alpha

    def on_resume(old: DoremiState, fresh: DoremiState) -> DoremiState:
        """With the same sampling all goes on; otherwise alpha does and its average starts over."""
        same = jnp.all(old.sampling == fresh.sampling)
        # What was not drawn is as a further domain.
        alpha = only(jnp.where(old.sampling > 0, old.alpha, fresh.alpha), fresh.sampling > 0)
        return old._replace(
            alpha=alpha / jnp.sum(alpha),
            alpha_sum=jnp.where(same, old.alpha_sum, fresh.alpha_sum),
            count=jnp.where(same, old.count, fresh.count),
            sampling=fresh.sampling,
        )

    return Mixer(
        init=init,
        update=update,
        sampling_weights=lambda state: state.sampling,
        loss_weights=loss_weights,
        loss_mean="tokens" if loss_norm == "official" else "domains",
        average=average,
        on_resume=on_resume,
        reference=model,
    )
