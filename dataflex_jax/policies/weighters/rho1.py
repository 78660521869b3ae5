"""Rho-1: train on the tokens that a reference model finds easier than the trained one does.

Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need", arXiv 2404.07965.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import RowObservation, Weighter, options, register_weighter
from dataflex_jax.policies.common.reference import reference_model


@register_weighter("rho1")
def rho1(*, keep: float = 0.6, reference: str | None = None, reference_losses: str = "model") -> Weighter:
    """Keeps the `keep` share of the batch's tokens whose loss exceeds the reference model's the most.

    Of the n tokens of the whole batch that count in the loss, the `k = max(1, round(keep n))` (halves up) of the
    largest `l_tok - l_tok_reference` are kept, of equals the first in the batch. Their weight is n / k, so that the
    mean over the counted tokens is 1 and the loss is the mean over the kept ones, as in the paper; all others have 0.

    Args:
        keep: share of the tokens that are kept, in (0, 1].
        reference: the reference model: a run folder, the folder of one step in it, or a Hugging Face folder or hub id.
        reference_losses: "model": computed in each step; "cached": read from a store that is computed once.

    Raises:
        ValueError: a hyperparameter out of its range, or no reference.
    """
    options.between("keep", keep, 0, 1, open_low=True)
    model = reference_model(reference, reference_losses)

    def weigh(state: tuple, observation: RowObservation) -> Float[Array, "B T"]:
        counted = observation.mask.ravel() > 0
        excess = (observation.token_losses - observation.reference_losses).ravel()
        order = jnp.argsort(jnp.where(counted, -excess, jnp.inf), stable=True)
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
        n = jnp.sum(counted)
        k = jnp.maximum(1, jnp.floor(keep * n + 0.5).astype(n.dtype))
        kept = counted & (rank < k)
        return (kept * (n / k)).reshape(observation.mask.shape).astype(jnp.float32)

    return Weighter(init=lambda width: (), weigh=weigh, reference=model)
