"""The mapped programs: the train step and the losses of S models, each compiled as one.

The members' axis is manual over the mesh's "data" axis, so that a device works on its own members alone and no
collective is needed. On a device they are vectorised by `jax.vmap`, which fills an accelerator; a CPU, which one of
them fills, takes one after the other (`jax.lax.map`) in the same program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.mapped.states import over_members
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import drawing_only
from dataflex_jax.reporting.hardware import total_memory_bytes
from dataflex_jax.training.assembly import Experiment, train_step
from dataflex_jax.training.state import Fixed, TrainState
from dataflex_jax.training.step import domain_statistics

_SHARE = 0.75  # of a device's memory
_SPLIT, _WHOLE = P("data"), P()


class MappedStep:
    """The train step of S models: `(states, batch) -> (states, metrics)`, all with a leading axis S.

    Args:
        experiment: what the models share.
        reference: of the policies, where its losses are computed in the step.
        drawn: which domains a member draws from.
        mesh: the devices.
    """

    def __init__(self, experiment: Experiment, reference: Model | None, drawn: Bool[np.ndarray, "S K"], mesh: Mesh):
        self._fixed = Fixed(experiment.learner.frozen, reference)
        self._drawn = jax.device_put(drawn, over_members(mesh))
        step, mixer = train_step(experiment), experiment.policies.mixer

        def one(state: TrainState, batch: Batch, drawn: Array, fixed: Fixed):
            policy = drawing_only(mixer.policy, drawn)
            return dataclasses.replace(step, mixer=mixer._replace(policy=policy))(state, batch, fixed)

        def without(state: TrainState, batch: Batch, drawn: Array, fixed: Fixed):
            return step(state, batch, fixed)

        self._jitted = jax.jit(mapped(without if drawn.all() else one, 3, mesh), donate_argnums=0)
        self._compiled: dict[tuple[tuple[int, ...], int | None], Any] = {}

    def __call__(self, states: TrainState, batch: Batch) -> tuple[TrainState, dict[str, PyTree]]:
        """One optimizer step of each."""
        return self.compiled(states, batch)(states, batch, self._drawn, self._fixed)

    def compiled(self, states: TrainState, batch: Batch) -> Any:
        """The program for a batch of this shape."""
        key = batch.tokens.shape, batch.most_segments
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(states, batch, self._drawn, self._fixed).compile()
        return self._compiled[key]

    def fits(self, states: TrainState, batch: Batch) -> bool:
        """Whether the program fits into its share of a device's memory; True where neither is known."""
        analysis, there = self.compiled(states, batch).memory_analysis(), total_memory_bytes()
        if analysis is None or there is None:
            return True
        used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return used + analysis.temp_size_in_bytes <= _SHARE * there / jax.device_count()


def mapped_losses(num_groups: int, mesh: Mesh) -> Callable[[PyTree, Model, Batch], tuple[Array, Array]]:
    """(trained parameters with a leading axis S, the model without them, batch) -> sums of the losses, and tokens.

    Both are [S, G]; the batch, the same for all models, has in `domain` the group of each row.
    """

    def one(params: PyTree, fixed: tuple[Model, Batch]) -> tuple[Float[Array, " G"], Float[Array, " G"]]:
        model, batch = fixed
        losses = model.with_params(params).token_losses(batch).losses
        statistics = domain_statistics(losses, batch, num_groups)
        return statistics.loss * statistics.tokens, statistics.tokens

    of_models = mapped(one, 1, mesh)
    return jax.jit(lambda params, model, batch: of_models(params, (model, batch)))


def vectorises(mesh: Mesh) -> bool:
    """Whether members are vectorised on a device."""
    return mesh.devices.flat[0].platform != "cpu"


def mapped(function: Callable, arguments: int, mesh: Mesh) -> Callable:
    """`function` of each member's own arguments, the first ones, and a last one that all share.

    Args:
        function: of one member.
        arguments: how many are its own.
        mesh: the devices.
    """

    def local(*given: PyTree) -> PyTree:
        own, shared = given[:-1], given[-1]
        if vectorises(mesh):
            return jax.vmap(function, in_axes=(*(0,) * arguments, None))(*own, shared)
        return jax.lax.map(lambda member: function(*member, shared), own)

    specs = (*(_SPLIT,) * arguments, _WHOLE)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_SPLIT, check_vma=False)
