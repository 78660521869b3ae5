"""Fixed proportions, the baseline of every mixing experiment."""

from typing import NamedTuple

from jaxtyping import Array, Float

from dataflex_jax.policies.base import Mixer
from dataflex_jax.policies.proportions import starting_proportions
from dataflex_jax.policies.registry import register_mixer


class StaticState(NamedTuple):
    """weights: the proportions, float32 [K]."""

    weights: Float[Array, " K"]


@register_mixer("static")
def static(*, proportions: tuple | str | None = None) -> Mixer:
    """Samples from `proportions` for the whole run.

    Args:
        proportions: K weights of any scale, "uniform", or None for `config.data.proportions`.

    Raises:
        InputError: from `init`, when the proportions do not fit the domains.
    """
    return Mixer(
        init=lambda natural: StaticState(starting_proportions(proportions, natural, "config.mixer.proportions")),
        update=lambda state, observation: state,
        sampling_weights=lambda state: state.weights,
    )
