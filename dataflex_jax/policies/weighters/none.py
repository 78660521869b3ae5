"""No weighting, the baseline of every weighting experiment."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import RowObservation, Weighter, register_weighter


@register_weighter("none")
def none() -> Weighter:
    """Every row counts the same."""

    def weigh(state: tuple, observation: RowObservation) -> Float[Array, " B"]:
        return jnp.ones_like(observation.losses)

    return Weighter(init=lambda width: (), weigh=weigh)
