"""Random proportions, the control that shows how much of a mixer's gain is mere variety."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import Mixer, Observation, options, register_mixer


class RandomState(NamedTuple):
    """weights: the last draw, float32 [K]."""

    weights: Float[Array, " K"]


@register_mixer("random")
def random(*, concentration: float = 1.0) -> Mixer:
    """Draws the proportions anew from a symmetric Dirichlet at each scheduled update; initial proportions before it.

    The draw of update u comes from the run's policy key folded with u, so it does not depend on what was trained.

    Args:
        concentration: of the Dirichlet; 1 is uniform over the simplex, large values concentrate at 1/K.

    Raises:
        ValueError: concentration <= 0.
    """
    options.positive("concentration", concentration)

    def update(state: RandomState, observation: Observation) -> RandomState:
        key = jax.random.fold_in(observation.key, observation.update)
        draw = jax.random.dirichlet(key, jnp.full(state.weights.shape, concentration, jnp.float32))
        return RandomState(jnp.where(observation.update < 0, state.weights, draw))

    return Mixer(init=RandomState, update=update, sampling_weights=lambda state: state.weights)
