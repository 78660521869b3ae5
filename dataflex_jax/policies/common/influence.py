"""Cosine similarities between gradients of candidates and of target groups: what less, icons and cluster_less share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies.signals import Gradients, Preconditioner, Signals
from dataflex_jax.signals.projections import METHODS, Projection

GRADIENT_TYPES = ("adam", "sgd")
EPS_MODES = ("outside", "inside")
TARGET_AGGREGATIONS = ("mean_of_cos", "cos_of_mean")
GROUP_AGGREGATIONS = ("max", "mean")


class Influence(NamedTuple):
    """How gradients are taken and compared.

    Attributes:
        projection: of the gradients of both sides.
        adam: preconditioning of the candidates' gradients; None: plain ones. Targets' gradients are plain.
        target_agg: "mean_of_cos": the mean of a candidate's cosines with the group's targets; "cos_of_mean": its cosine
            with their mean gradient.
    """

    projection: Projection
    adam: Preconditioner | None
    target_agg: str = "mean_of_cos"


def influence(
    *,
    proj_dim: int,
    projection: str,
    gradient_type: str,
    eps_mode: str,
    bias_correction: bool,
    projection_seed: int,
    target_agg: str = "mean_of_cos",
) -> Influence:
    """An `Influence` of hyperparameters; see `less`.

    Raises:
        ValueError: a hyperparameter out of its range, by name.
    """
    if proj_dim < 1:
        raise ValueError(f"proj_dim = {proj_dim}: must be >= 1")
    for name, value, accepted in (
        ("projection", projection, METHODS),
        ("gradient_type", gradient_type, GRADIENT_TYPES),
        ("eps_mode", eps_mode, EPS_MODES),
        ("target_agg", target_agg, TARGET_AGGREGATIONS),
    ):
        check_option(name, value, accepted)
    if projection == "kronecker" and gradient_type == "adam":
        raise ValueError(
            "projection = 'kronecker': forms no gradient that Adam's moments could shape; needs gradient_type = 'sgd'"
        )
    adam = Preconditioner(eps_mode, bias_correction) if gradient_type == "adam" else None
    return Influence(Projection(projection, proj_dim, projection_seed), adam, target_agg)


def check_option(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Refuses a value that is none of the accepted ones.

    Raises:
        ValueError: names the hyperparameter.
    """
    if value not in accepted:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(accepted)}")


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
        raise InputError("config.targets: the selector compares gradients with a target set's, and there is none")
    gradients = np.asarray(targets.sweep(Gradients(influence.projection)), np.float32)
    rows = []
    for group, name in enumerate(targets.group_names):
        members = gradients[np.asarray(targets.groups) == group].astype(np.float64)
        members = members[np.isfinite(members).all(axis=1) & members.any(axis=1)]
        if influence.target_agg == "mean_of_cos":
            members /= np.linalg.norm(members, axis=1, keepdims=True)
        mean = members.sum(axis=0) / max(len(members), 1)
        if not mean.any():
            raise InputError(
                f"config.targets: no gradient to go by in group {name!r}: each group needs an example with a token "
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
    wanted = Gradients(influence.projection, influence.adam, then=cosines)
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
    wanted = Gradients(influence.projection, influence.adam, then=_AGGREGATED_COSINES[group_agg])
    return np.float32(weight) * np.asarray(
        checkpoint.candidates.sweep(wanted, operand=directions(influence, checkpoint))
    )
