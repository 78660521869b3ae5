"""Fixed proportions, the baseline of every mixing experiment, and proportions that change at fixed steps."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dataflex_jax.policies import Mixer, Observation, options, register_mixer
from dataflex_jax.policies.proportions import Proportions, only, starting_proportions


class StaticState(NamedTuple):
    """weights: the proportions, float32 [K]."""

    weights: Float[Array, " K"]


class StagedState(NamedTuple):
    """The proportions of the stages.

    Attributes:
        weights: at the present step, float32 [K].
        natural: those of the run, float32 [K].
    """

    weights: Float[Array, " K"]
    natural: Float[Array, " K"]


@register_mixer("static")
def static(
    *,
    proportions: Proportions = None,
    stages: tuple[tuple[int, Any], ...] | None = None,
    interpolate: bool = False,
) -> Mixer:
    """Samples from `proportions` for the whole run, or from those of the stage that a step belongs to.

    With stages `((s_1, w_1), (s_2, w_2), ...)` the weights after step s are `w_i` of the last `s_i <= s`. With
    `interpolate`, they are `w_i + (s - s_i) / (s_{i+1} - s_i) (w_{i+1} - w_i)`, and `w_n` after the last stage's step.
    As of every mixer, they are drawn from when the schedule has published them: with updates at every step, from step
    `s + 1 + lag` on.

    Args:
        proportions: K weights of any scale, "uniform", or None for those of the run.
        stages: (step, weights) each, the steps increasing from 0; weights are as `proportions`, or "natural" for those
            of the run. None: there are none.
        interpolate: whether the weights go from stage to stage in a straight line.

    Raises:
        ValueError: stages out of order, or beside proportions; from `init`, when weights do not fit the domains.
    """
    if stages is None:
        options.require("interpolate", interpolate, not interpolate, "False without stages")
        return Mixer(
            init=lambda natural: StaticState(starting_proportions("proportions", proportions, natural)),
            update=lambda state, observation: state,
            sampling_weights=lambda state: state.weights,
        )
    options.require("proportions", proportions, proportions is None, "None beside stages")
    steps = [step for step, _ in stages]
    ordered = steps[:1] == [0] and all(a < b for a, b in itertools.pairwise(steps))
    options.require("stages", stages, ordered, "(step, weights) pairs whose steps increase from 0")

    def at(step: Int[Array, ""] | int, natural: Float[Array, " K"]) -> Float[Array, " K"]:
        table = jnp.stack([_weights(weights, natural) for _, weights in stages])
        if interpolate:
            return jnp.stack([jnp.interp(step, jnp.asarray(steps, jnp.float32), column) for column in table.T])
        return table[jnp.searchsorted(jnp.asarray(steps), step, side="right") - 1]

    def init(natural: Float[Array, " K"]) -> StagedState:
        for _, weights in stages:
            if weights != "natural":
                starting_proportions("stages", weights, natural)
        shares = starting_proportions("stages", None, natural)
        return StagedState(at(0, shares), shares)

    def update(state: StagedState, observation: Observation) -> StagedState:
        return state._replace(weights=at(observation.step, state.natural))

    return Mixer(init=init, update=update, sampling_weights=lambda state: state.weights)


def _weights(weights: Sequence[float] | str, natural: Float[Array, " K"]) -> Float[Array, " K"]:
    """What a stage's weights mean, inside the train step too; `init` has checked them."""
    if weights == "natural":
        return natural
    shares = np.ones(len(natural)) if weights == "uniform" else np.asarray(weights, np.float64)
    return only(jnp.asarray(shares / shares.sum(), jnp.float32), natural > 0)
