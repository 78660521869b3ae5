"""Cosine similarities between gradients of candidates and of target groups: what less, icons and cluster_less share.

`exact` has the form without a projection; here is the one with it, and the choice between them.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies import options
from dataflex_jax.policies.common import exact
from dataflex_jax.policies.signals import (
    EPS_MODES,
    METHODS,
    PARAMETERS,
    TARGETS,
    WHOLE_ROWS,
    Gradients,
    Preconditioner,
    Projection,
    RowSet,
    Signals,
)

logger = logging.getLogger(__name__)

PROJECTIONS = ("auto", "exact", *METHODS)
FALLBACK = "sketch"  # of "auto"
GRADIENT_TYPES = ("adam", "sgd")
TARGET_AGGREGATIONS = ("mean_of_cos", "cos_of_mean")
GROUP_AGGREGATIONS = ("max", "mean")


class Influence(NamedTuple):
    """How gradients are taken and compared.

    Attributes:
        projection: of the gradients of both sides; unused where nothing is projected.
        adam: preconditioning of the candidates' gradients; None: plain ones. Targets' gradients are plain.
        target_agg: "mean_of_cos": the mean of a candidate's cosines with the group's targets; "cos_of_mean": its cosine
            with their mean gradient.
        parameters: with respect to which the gradients are; see `Gradients`. "auto": "all" where nothing is projected,
            else "blocks".
        unprojected: whether nothing is projected; None: where the target groups' directions fit.
    """

    projection: Projection
    adam: Preconditioner | None
    target_agg: str = "mean_of_cos"
    parameters: str = "blocks"
    unprojected: bool | None = False

    def compared(self) -> exact.Compared:
        """What is compared where nothing is projected."""
        return exact.Compared(self.adam, self.target_agg, self.parameters)

    def projected(self) -> "Influence":
        """The same with a projection."""
        parameters = "blocks" if self.parameters == "auto" else self.parameters
        return self._replace(unprojected=False, parameters=parameters)

    def for_signals(self, signals: Signals) -> "Influence":
        """The same, with what was left open decided by the model and the target set; says in the log how.

        Raises:
            InputError: there is no target set.
        """
        if self.unprojected is False:
            return self.projected()
        parameters = "all" if self.parameters == "auto" else self.parameters
        # The first one, which will be asked first: several checkpoints are opened one after the other.
        _, first = signals.checkpoints[0]
        groups, room = len(_targets(first).group_names), first.room_for_directions(parameters)
        if self.unprojected or room >= groups:
            _say(f"Influences are exact (projection exact, parameters {parameters}, {groups} target groups).")
            return self._replace(unprojected=True, parameters=parameters)
        projected = self.projected()
        _say(
            f"Influences are of projected gradients (projection {self.projection.method}, parameters "
            f"{projected.parameters}): of the directions of {groups} target groups {room} fit into their share of a "
            "device's memory; projection exact takes them in blocks."
        )
        return projected

    def of_targets(self) -> Gradients:
        """The signal of the targets."""
        return Gradients(self.projection, parameters=self.parameters)

    def of_candidates(self, then: Callable | None = None) -> Gradients:
        """The signal of the candidates, and what is wanted of it; see `Gradients`."""
        return Gradients(self.projection, self.adam, then, self.parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceOptions:
    """The hyperparameters of every selector by influence. `less` says what the formulas are.

    Attributes:
        proj_dim: numbers that a gradient is projected to; unused by "exact" and "none".
        projection: "exact" (none: inner products with one direction a target group), "sketch" (random signs and a
            sparse hash), "rademacher" (dense random signs, the authors'), "kronecker" (from activations and output
            gradients; gradient_type "sgd" only), "none" (whole gradients in memory; small models), or "auto": "exact"
            where the directions of all groups fit into a share of the devices' memory, else "sketch".
        gradient_type: of the candidates: "adam": preconditioned by the optimizer's moments; "sgd": the plain gradient.
        eps_mode: "outside": `m' / (sqrt(v') + eps)`; "inside": `m' / sqrt(v' + eps)`, the authors' code. Unused by
            "sgd".
        bias_correction: whether m' and v' are divided by `1 - b^t`. Unused by "sgd".
        target_agg: "mean_of_cos": the mean of a candidate's cosines with the group's targets, the authors' code;
            "cos_of_mean": its cosine with their mean gradient, the paper.
        group_agg: a candidate's score: the "max" or the "mean" of its influences on the groups.
        projection_seed: of the random map.
        parameters: what the gradients are with respect to. "blocks": the adapters where there are any, else the kernels
            of the blocks' linear layers; "all": everything that is trained, embeddings, head, norms and biases too,
            whose gradients are in memory whole, one of each example of a batch (not with "kronecker"). "auto": "all"
            with "exact", else "blocks".

    Raises:
        ValueError: a hyperparameter out of its range.
    """

    proj_dim: int = 8192
    projection: str = "auto"
    gradient_type: str = "adam"
    eps_mode: str = "outside"
    bias_correction: bool = False
    target_agg: str = "mean_of_cos"
    group_agg: str = "max"
    projection_seed: int = 0
    parameters: str = "auto"

    def __post_init__(self):
        options.between("proj_dim", self.proj_dim, 1, 2**24)
        options.one_of("projection", self.projection, PROJECTIONS)
        options.one_of("gradient_type", self.gradient_type, GRADIENT_TYPES)
        options.one_of("eps_mode", self.eps_mode, EPS_MODES)
        options.one_of("target_agg", self.target_agg, TARGET_AGGREGATIONS)
        options.one_of("group_agg", self.group_agg, GROUP_AGGREGATIONS)
        options.one_of("parameters", self.parameters, ("auto", *PARAMETERS))
        if self.projection == "kronecker" and self.parameters == "all":
            options.refuse("projection", self.projection, "is of linear layers; needs parameters = 'blocks'")
        if self.projection == "kronecker" and self.gradient_type == "adam":
            reason = "forms no gradient that Adam's moments could shape; needs gradient_type = 'sgd'"
            options.refuse("projection", self.projection, reason)

    def needs(self) -> frozenset[Hashable]:
        """What must be there for the comparison."""
        return frozenset({TARGETS, WHOLE_ROWS} if self.projection == "kronecker" else {TARGETS})

    def influence(self) -> Influence:
        """How these options compare gradients."""
        adam = Preconditioner(self.eps_mode, self.bias_correction) if self.gradient_type == "adam" else None
        method = self.projection if self.projection in METHODS else FALLBACK
        projection = Projection(method, self.proj_dim, self.projection_seed)
        unprojected = {"auto": None, "exact": True}.get(self.projection, False)
        return Influence(projection, adam, self.target_agg, self.parameters, unprojected)


@functools.cache
def _say(text: str) -> None:
    logger.info(text)


def unit(features: Float[Array, "*B P"]) -> Float[Array, "*B P"]:
    """Rows scaled to length 1; NaN throughout where a row is zero or not finite."""
    largest = jnp.max(jnp.abs(features), axis=-1, keepdims=True)
    # The squares of small gradients underflow in float32 unless they are scaled first.
    scaled = features / jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.nan)
    return scaled / jnp.linalg.norm(scaled, axis=-1, keepdims=True)


def cosines(features: Float[Array, "B P"], directions: Float[Array, "G P"]) -> Float[Array, "B G"]:
    """The influences of rows: inner products of their directions with those of the target groups."""
    return jnp.matmul(unit(features), directions.T, precision=jax.lax.Precision.HIGHEST)


def _largest_cosine(features: Float[Array, "B P"], directions: Float[Array, "G P"]) -> Float[Array, " B"]:
    return jnp.max(cosines(features, directions), axis=-1)


def _mean_cosine(features: Float[Array, "B P"], directions: Float[Array, "G P"]) -> Float[Array, " B"]:
    return jnp.mean(cosines(features, directions), axis=-1)


# Functions of the module, because a sweep is compiled once for each function that it applies.
_AGGREGATED_COSINES = {"max": _largest_cosine, "mean": _mean_cosine}


def aggregate(influences: Float[np.ndarray, "n G"], group_agg: str) -> Float[np.ndarray, " n"]:
    """One score of each row's influences on the groups: "max" or "mean"; NaN where one of them is."""
    return np.max(influences, axis=1) if group_agg == "max" else np.mean(influences, axis=1)


def _targets(signals: Signals) -> RowSet:
    if signals.targets is None:
        raise InputError("a selector by influence needs a target set to compare gradients with")
    return signals.targets


def directions(influence: Influence, signals: Signals) -> Float[Array, "G P"]:
    """What to compare candidates with, float32, one row a target group.

    Targets whose gradient is zero or not finite have none and are left out.

    Raises:
        InputError: there is no target set, or a group of it has no direction.
    """
    targets = _targets(signals)
    gradients = np.asarray(targets.sweep(influence.of_targets()), np.float32)
    rows = []
    for group, name in enumerate(targets.group_names):
        members = gradients[np.asarray(targets.groups) == group].astype(np.float64)
        members = members[np.isfinite(members).all(axis=1) & members.any(axis=1)]
        if influence.target_agg == "mean_of_cos":
            members /= np.linalg.norm(members, axis=1, keepdims=True)
        mean = members.sum(axis=0) / max(len(members), 1)
        if not mean.any():
            raise exact.no_direction(name)
        rows.append(mean if influence.target_agg == "mean_of_cos" else mean / np.linalg.norm(mean))
    return jnp.asarray(np.stack(rows), jnp.float32)


def group_influences(influence: Influence, signals: Signals) -> Float[np.ndarray, "N G"]:
    """Each candidate's influence on each target group, summed over the checkpoints with their weights.

    NaN where a candidate's gradient is zero or not finite.

    Raises:
        InputError: there is no target set, or a group of it has no direction.
    """
    return _summed(influence.for_signals(signals), signals)


def _summed(influence: Influence, signals: Signals) -> Float[np.ndarray, "N G"]:
    return sum(np.float32(weight) * _influences(influence, checkpoint) for weight, checkpoint in signals.checkpoints)


def _influences(influence: Influence, signals: Signals) -> Float[np.ndarray, "N G"]:
    if influence.unprojected:
        return exact.group_influences(influence.compared(), signals)
    wanted = influence.of_candidates(cosines)
    return np.asarray(signals.candidates.sweep(wanted, operand=directions(influence, signals)))


def scores(influence: Influence, signals: Signals, group_agg: str) -> Float[np.ndarray, " N"]:
    """The aggregate over the target groups of each candidate's influences.

    With one checkpoint, one float a candidate leaves the device; with several, one for each group.

    Raises:
        InputError: see `group_influences`.
    """
    influence = influence.for_signals(signals)
    if len(signals.checkpoints) > 1:
        return aggregate(_summed(influence, signals), group_agg)
    ((weight, checkpoint),) = signals.checkpoints
    if influence.unprojected:
        return np.float32(weight) * exact.scores(influence.compared(), checkpoint, group_agg)
    wanted = influence.of_candidates(_AGGREGATED_COSINES[group_agg])
    return np.float32(weight) * np.asarray(
        checkpoint.candidates.sweep(wanted, operand=directions(influence, checkpoint))
    )
