"""Cosine similarities between gradients of candidates and of target groups: what less, icons and cluster_less share."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies import options
from dataflex_jax.policies.signals import (
    EPS_MODES,
    METHODS,
    PARAMETERS,
    Gradients,
    Preconditioner,
    Projection,
    Signals,
)

GRADIENT_TYPES = ("adam", "sgd")
TARGET_AGGREGATIONS = ("mean_of_cos", "cos_of_mean")
GROUP_AGGREGATIONS = ("max", "mean")


class Influence(NamedTuple):
    """How gradients are taken and compared.

    Attributes:
        projection: of the gradients of both sides.
        adam: preconditioning of the candidates' gradients; None: plain ones. Targets' gradients are plain.
        target_agg: "mean_of_cos": the mean of a candidate's cosines with the group's targets; "cos_of_mean": its cosine
            with their mean gradient.
        parameters: with respect to which the gradients are; see `Gradients`.
    """

    projection: Projection
    adam: Preconditioner | None
    target_agg: str = "mean_of_cos"
    parameters: str = "blocks"

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
        proj_dim: numbers that a gradient is projected to; unused by "none".
        projection: "sketch" (random signs and a sparse hash), "rademacher" (dense random signs, the authors'),
            "kronecker" (from activations and output gradients; gradient_type "sgd" only) or "none" (exact).
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
            whose gradients are in memory whole, one of each example of a batch (not with "kronecker").

    Raises:
        ValueError: a hyperparameter out of its range.
    """

    proj_dim: int = 8192
    projection: str = "sketch"
    gradient_type: str = "adam"
    eps_mode: str = "outside"
    bias_correction: bool = False
    target_agg: str = "mean_of_cos"
    group_agg: str = "max"
    projection_seed: int = 0
    parameters: str = "blocks"

    def __post_init__(self):
        options.between("proj_dim", self.proj_dim, 1, 2**24)
        options.one_of("projection", self.projection, METHODS)
        options.one_of("gradient_type", self.gradient_type, GRADIENT_TYPES)
        options.one_of("eps_mode", self.eps_mode, EPS_MODES)
        options.one_of("target_agg", self.target_agg, TARGET_AGGREGATIONS)
        options.one_of("group_agg", self.group_agg, GROUP_AGGREGATIONS)
        options.one_of("parameters", self.parameters, PARAMETERS)
        if self.projection == "kronecker" and self.parameters == "all":
            options.refuse("projection", self.projection, "is of linear layers; needs parameters = 'blocks'")
        if self.projection == "kronecker" and self.gradient_type == "adam":
            reason = "forms no gradient that Adam's moments could shape; needs gradient_type = 'sgd'"
            options.refuse("projection", self.projection, reason)

    def influence(self) -> Influence:
        """How these options compare gradients."""
        adam = Preconditioner(self.eps_mode, self.bias_correction) if self.gradient_type == "adam" else None
        projection = Projection(self.projection, self.proj_dim, self.projection_seed)
        return Influence(projection, adam, self.target_agg, self.parameters)


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


def directions(influence: Influence, signals: Signals) -> Float[Array, "G P"]:
    """What to compare candidates with, float32, one row a target group.

    Targets whose gradient is zero or not finite have none and are left out.

    Raises:
        InputError: there is no target set, or a group of it has no direction.
    """
    targets = signals.targets
    if targets is None:
        raise InputError("a selector by influence needs a target set to compare gradients with")
    gradients = np.asarray(targets.sweep(influence.of_targets()), np.float32)
    rows = []
    for group, name in enumerate(targets.group_names):
        members = gradients[np.asarray(targets.groups) == group].astype(np.float64)
        members = members[np.isfinite(members).all(axis=1) & members.any(axis=1)]
        if influence.target_agg == "mean_of_cos":
            members /= np.linalg.norm(members, axis=1, keepdims=True)
        mean = members.sum(axis=0) / max(len(members), 1)
        if not mean.any():
            raise InputError(
                f"the target set has no gradient to go by in group {name!r}: each group needs an example with a token "
                "that counts and a finite loss"
            )
        rows.append(mean if influence.target_agg == "mean_of_cos" else mean / np.linalg.norm(mean))
    return jnp.asarray(np.stack(rows), jnp.float32)


def group_influences(influence: Influence, signals: Signals) -> Float[np.ndarray, "N G"]:
    """Each candidate's influence on each target group, summed over the checkpoints with their weights.

    NaN where a candidate's gradient is zero or not finite.

    Raises:
        InputError: see `directions`.
    """
    wanted = influence.of_candidates(cosines)
    return sum(
        np.float32(weight) * np.asarray(checkpoint.candidates.sweep(wanted, operand=directions(influence, checkpoint)))
        for weight, checkpoint in signals.checkpoints
    )


def scores(influence: Influence, signals: Signals, group_agg: str) -> Float[np.ndarray, " N"]:
    """The aggregate over the target groups of each candidate's influences.

    With one checkpoint, one float a candidate leaves the device; with several, one for each group.

    Raises:
        InputError: see `directions`.
    """
    if len(signals.checkpoints) > 1:
        return aggregate(group_influences(influence, signals), group_agg)
    ((weight, checkpoint),) = signals.checkpoints
    wanted = influence.of_candidates(_AGGREGATED_COSINES[group_agg])
    return np.float32(weight) * np.asarray(
        checkpoint.candidates.sweep(wanted, operand=directions(influence, checkpoint))
    )
