"""Shuffled: the control for every curriculum."""

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from dataflex_jax.policies import Order, register_order
from dataflex_jax.policies.common import pattern


@register_order("shuffle")
def shuffle(*, dynamic: bool = False) -> Order:
    """A uniformly random permutation; needs no scores.

    Args:
        dynamic: whether each update draws another one.
    """

    def arrange(scores: Float[np.ndarray, " n"], key: PRNGKeyArray) -> Int[np.ndarray, " n"]:
        return pattern.generator(key).permutation(len(scores))

    return Order(arrange=arrange, dynamic=dynamic)
