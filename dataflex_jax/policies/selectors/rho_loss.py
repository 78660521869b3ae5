"""RHO-LOSS: of the rows drawn for a step, those that a reference model finds easier than the trained one does.

Mindermann et al. 2022, "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt",
ICML 2022, arXiv 2206.07137.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dataflex_jax.policies import DrawnRows, Online, Selector, options, register_selector
from dataflex_jax.policies.common.reference import reference_model


@register_selector("rho_loss")
def rho_loss(*, oversample: int = 2, reference: str | None = None, reference_losses: str = "model") -> Selector:
    """Keeps one of `oversample` rows that are drawn for a step: those of the largest reducible holdout loss.

    That is the row's token-mean loss less its token-mean loss under the reference model, which was trained on data of
    the kind that matters (in the paper, held-out data). Of equals the first is taken; rows without a token in the loss,
    or whose loss is not finite, come after all others.

    Args:
        oversample: rows that are drawn for each one that is trained on.
        reference: the reference model: a run folder, the folder of one step in it, or a Hugging Face folder or hub id.
        reference_losses: "model": computed in each step; "cached": read from a store that is computed once.

    Raises:
        ValueError: a hyperparameter out of its range, or no reference.
    """
    options.at_least("oversample", oversample, 2)
    model = reference_model(reference, reference_losses)

    def pick(seen: DrawnRows, num: int) -> Int[Array, " num"]:
        tokens = jnp.sum(seen.mask, axis=1)
        excess = seen.losses - jnp.sum(seen.mask * seen.reference_losses, axis=1) / jnp.maximum(tokens, 1.0)
        usable = jnp.isfinite(excess) & (tokens > 0)
        return jnp.argsort(jnp.where(usable, -excess, jnp.inf), stable=True)[:num]

    return Selector(score=None, choose=None, online=Online(pick, oversample, reference=model))
