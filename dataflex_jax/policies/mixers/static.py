"""Fixed proportions, the baseline of every mixing experiment."""

from typing import NamedTuple

from jaxtyping import Array, Float

from dataflex_jax.policies import Mixer, register_mixer
from dataflex_jax.policies.proportions import Proportions, starting_proportions


class StaticState(NamedTuple):
    """weights: the proportions, float32 [K]."""

    weights: Float[Array, " K"]


@register_mixer("static")
def static(*, proportions: Proportions = None) -> Mixer:
    """Samples from `proportions` for the whole run.

    Args:
        proportions: K weights of any scale, "uniform", or None for those of the run.

    Raises:
        ValueError: from `init`, when the proportions do not fit the domains.
    """
    return Mixer(
        init=lambda natural: StaticState(starting_proportions("proportions", proportions, natural)),
        update=lambda state, observation: state,
        sampling_weights=lambda state: state.weights,
    )
