"""Influences without a projection: of each candidate, its inner products with one direction a target group.

The mean over a group's targets of a candidate's cosines with them is <g, D> / |g| with D = mean_j g_j / |g_j|, because
the cosine is linear in a target's unit gradient; so is its cosine with their mean gradient, with D = sum_j g_j / |sum_j
g_j|. No per-example gradient is kept, of neither side, and nothing is lost.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from dataflex_jax.errors import InputError
from dataflex_jax.policies.signals import GradientNorms, Influences, Preconditioner, RowSet, Signals


class Compared(NamedTuple):
    """What is compared; see `influence.Influence`."""

    adam: Preconditioner | None
    target_agg: str
    parameters: str


def group_influences(compared: Compared, signals: Signals) -> Float[np.ndarray, "N G"]:
    """Each candidate's influence on each target group; NaN where its gradient is zero or not finite.

    Raises:
        InputError: a group of the target set has no direction.
    """
    return np.concatenate(list(_swept(compared, signals)), axis=1)


def scores(compared: Compared, signals: Signals, group_agg: str) -> Float[np.ndarray, " N"]:
    """The "max" or "mean" of each candidate's influences on the groups, of which one float leaves the devices.

    Raises:
        InputError: see `group_influences`.
    """
    if group_agg == "max":
        return functools.reduce(np.maximum, _swept(compared, signals, _largest))
    return functools.reduce(np.add, _swept(compared, signals, _total)) / np.float32(len(signals.targets.group_names))


# Functions of the module, because a sweep is compiled once for each function that it applies.
def _largest(influences: Float[Array, "B G"]) -> Float[Array, " B"]:
    return jnp.max(influences, axis=1)


def _total(influences: Float[Array, "B G"]) -> Float[Array, " B"]:
    return jnp.sum(influences, axis=1)


def _swept(compared: Compared, signals: Signals, then: Callable | None = None) -> Iterator[np.ndarray]:
    """A sweep for each block of groups whose directions fit into the devices' memory together."""
    weights = target_weights(compared, signals.targets)
    blocks = -(-weights.shape[1] // max(1, signals.room_for_directions(compared.parameters)))
    for columns in np.array_split(np.arange(weights.shape[1]), blocks):
        operand = _directions(compared, signals.targets, weights, columns)
        yield np.asarray(signals.candidates.sweep(Influences(compared.adam, then), operand=operand))


def target_weights(compared: Compared, targets: RowSet) -> Float[np.ndarray, "M G"]:
    """What each target's gradient is multiplied by in its group's direction, up to a factor of each group's.

    Targets whose gradient is zero or not finite have none and get 0.

    Raises:
        InputError: a group has no others.
    """
    norms = np.asarray(targets.sweep(GradientNorms(compared.parameters)), np.float64)
    usable = np.isfinite(norms) & (norms > 0)
    weights = np.zeros((len(norms), len(targets.group_names)), np.float32)
    for group, name in enumerate(targets.group_names):
        members = usable & (np.asarray(targets.groups) == group)
        if not members.any():
            raise no_direction(name)
        # Of gradients of any length the direction's length is about 1, as float32 wants it.
        divisor = norms[members] if compared.target_agg == "mean_of_cos" else norms[members].max()
        weights[members, group] = 1 / (members.sum() * divisor)
    return weights


def no_direction(name: str) -> InputError:
    """What is said of a group of targets without any that has a direction."""
    return InputError(
        f"the target set has no gradient to go by in group {name!r}: each group needs an example with a token "
        "that counts and a finite loss"
    )


def _directions(compared, targets, weights, columns):
    directions = targets.gradient_sums(weights[:, columns], compared.parameters)
    lengths = np.asarray(lengths_of(directions))
    for column, length in zip(columns, lengths, strict=True):
        if not (np.isfinite(length) and length > 0):
            raise no_direction(targets.group_names[column])
    return directions if compared.target_agg == "mean_of_cos" else _scaled(directions, 1 / lengths)


@jax.jit
def lengths_of(directions: PyTree) -> Float[Array, " G"]:
    """The length of each of G directions."""

    def squares(leaf: Float[Array, "G ..."]) -> Float[Array, " G"]:
        # Row by row first: a running sum of millions of numbers loses digits.
        return jax.vmap(lambda one: jnp.sum(jnp.einsum("...i,...i->...", one, one, precision="highest")))(leaf)

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(directions))))


@jax.jit
def _scaled(directions: PyTree, factors: Float[Array, " G"]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf * factors.reshape(-1, *(1,) * (leaf.ndim - 1)), directions)
