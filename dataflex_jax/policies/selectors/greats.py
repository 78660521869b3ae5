"""GREATS: of the rows drawn for a step, those whose gradients lower the target loss the most together.

Wang et al. 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration", NeurIPS 2024.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dataflex_jax.policies import TARGETS, DrawnRows, Online, Selector, options, register_selector


@register_selector("greats")
def greats(*, oversample: int = 2, target_rows: int = 8) -> Selector:
    """Keeps one of `oversample` rows that are drawn for a step: the greedy optimum of the second-order fall of a loss.

    A step along the plain gradient of row i lowers the target loss by `s_i = eta <g_i, g_target>` to first order, eta
    being the learning rate. Once row p is taken, a row that moves the model alike is worth less: `s_j -= eta^2 <g_p,
    g_j>` (the target loss's Hessian is taken to be the identity, as in the paper). The row of the largest s is taken
    until there are enough; of equals the first. Inner products are exact, of the adapters where there are any, else of
    the kernels of the blocks' linear layers; they come from these layers' inputs and output gradients, in one more
    backward pass over all drawn rows and the targets.

    Rows without a token in the loss, or whose loss or gradient is not finite, come after all others.

    Args:
        oversample: rows that are drawn for each one that is trained on.
        target_rows: rows of the target set whose mean gradient is g_target, other ones for every step.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("oversample", oversample, 2)
    options.at_least("target_rows", target_rows, 1)

    def pick(seen: DrawnRows, num: int) -> Int[Array, " num"]:
        gram, target, eta = seen.gradients
        usable = jnp.isfinite(seen.losses) & (jnp.sum(seen.mask, axis=1) > 0)
        usable &= jnp.isfinite(target) & jnp.isfinite(jnp.diagonal(gram))

        def take(number, carry):
            scores, taken, ids = carry
            left = jnp.where(usable, scores, jnp.finfo(scores.dtype).min)
            best = jnp.argmax(jnp.where(taken, -jnp.inf, left))
            return scores - eta * gram[best], taken.at[best].set(True), ids.at[number].set(best)

        # Without the common factor eta, which is 0 in the first step of a warm-up.
        start = target, jnp.zeros(len(target), bool), jnp.zeros(num, jnp.int32)
        return jax.lax.fori_loop(0, num, take, start)[2]

    return Selector(
        score=None,
        choose=None,
        needs=frozenset({TARGETS}),
        online=Online(pick, oversample, target_rows=target_rows),
    )
