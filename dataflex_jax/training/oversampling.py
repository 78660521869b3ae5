"""More rows than a step trains on: drawn for it with rows of the target set to compare with, and the best of them kept.

A selector of this kind sees all drawn rows in a pass of their own, in evaluation mode. What is kept is a batch like any
other from then on: its rows in the order in which they were drawn, split over the devices and into microbatches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from dataflex_jax.data.batch import Batch, joined, split
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.data.window import shuffled_epochs
from dataflex_jax.errors import InputError
from dataflex_jax.models import layout
from dataflex_jax.models.model import Model
from dataflex_jax.policies.base import DrawnRows, RowGradients, Selector
from dataflex_jax.policies.schedule import Scheduled
from dataflex_jax.sharding import BATCH_AXES, constrain, row_shards
from dataflex_jax.signals import products
from dataflex_jax.signals.rows import row_loss, selected_paths
from dataflex_jax.signals.sweep import Source
from dataflex_jax.training.state import Fixed, TrainState


@dataclasses.dataclass(frozen=True)
class Oversampling:
    """What an online selector makes of a step's batch.

    Attributes:
        selector: with `online`.
        rows: that a step trains on.
        grad_accumulation: microbatches of these; passes without a gradient are over as many rows at a time.
    """

    selector: Scheduled[Selector]
    rows: int
    grad_accumulation: int = 1

    def drawn(self, step: int) -> int:
        """How many rows are drawn for a step: while the selector is not at work, those that are trained on."""
        at_work = self.selector.schedule.active(step)
        return self.rows * self.selector.policy.online.oversample if at_work else self.rows

    def kept(
        self, shape: Model, state: TrainState, fixed: Fixed, batch: Batch, learning_rate: Float[Array, ""]
    ) -> Batch:
        """The rows to train on, with their losses under a reference model where the selector has asked for these.

        Args:
            shape: of the model.
            state: before the step.
            fixed: parameters that are not trained.
            batch: that was drawn; itself where it has no more rows than are trained on.
            learning_rate: of the step.
        """
        if batch.num_rows == self.rows:
            return batch
        online, rows = self.selector.policy.online, batch.rows_alone()
        model = shape.having(state.params, fixed.frozen)
        if online.reference is not None and rows.reference_losses is None:
            rows = dataclasses.replace(rows, reference_losses=self._losses(fixed.reference, rows))
        if online.target_rows:
            token_losses, gram, target = compared(model, rows, batch.targets)
            gradients = RowGradients(gram, target, jnp.float32(learning_rate))
        else:
            token_losses, gradients = self._losses(model, rows), None
        seen = DrawnRows(
            step=state.step + 1,
            key=state.key,
            losses=jax.vmap(row_loss)(token_losses, rows),
            token_losses=token_losses,
            mask=rows.mask,
            domains=rows.domain,
            reference_losses=None if online.reference is None else rows.reference_losses,
            gradients=gradients,
        )
        # Whole on every device, so that all of them choose by the same numbers.
        seen = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), seen)
        places = jnp.sort(online.pick(seen, self.rows))
        taken = jax.tree.map(lambda x: constrain(x[places], BATCH_AXES, *(None,) * (x.ndim - 1)), rows)
        return dataclasses.replace(taken, drawn_with=batch.drawn_with)

    def _losses(self, model: Model, rows: Batch) -> Float[Array, "R T"]:
        """The token losses, of as many rows at a time as a microbatch has."""
        parts = rows.num_rows // self.rows * self.grad_accumulation
        return joined(jax.lax.map(lambda part: model.token_losses(part).losses, split(rows, parts)))


def compared(
    model: Model, rows: Batch, targets: Batch
) -> tuple[Float[Array, "R T"], Float[Array, "R R"], Float[Array, " R"]]:
    """(token losses, Gram matrix of the rows' gradients, their inner products with the targets' mean gradient).

    Targets without a token in the loss or with a gradient that is not finite are not in the mean. One backward pass for
    the rows and the targets together.
    """
    length = max(rows.mask.shape[1], targets.mask.shape[1])
    padded = (_padded(each, length, rows.segment_ids is not None, rows.most_segments) for each in (rows, targets))
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), *padded)
    token_losses, gram = products.gram(model, selected_paths(model.params), row_loss, both)
    number = rows.num_rows
    usable = (targets.row_tokens > 0) & jnp.isfinite(jnp.diagonal(gram)[number:])
    along = jnp.sum(jnp.where(usable, gram[:number, number:], 0.0), axis=1) / jnp.maximum(jnp.sum(usable), 1)
    return token_losses[:number, : rows.mask.shape[1]], gram[:number, :number], along


def _padded(rows: Batch, length: int, packed: bool, most_segments: int | None) -> Batch:
    """What the model and the loss read of the rows, with `length` inputs; beside packed rows, others as one segment."""

    def longer(values: Array) -> Array:
        return jnp.pad(values, ((0, 0), (0, length - rows.mask.shape[1])))

    whole = Batch(longer(rows.tokens), longer(rows.mask), rows.lengths, rows.domain)
    if not packed:
        return whole
    if rows.segment_ids is None:
        places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), whole.mask.shape)
        segments, positions = whole.real_inputs.astype(jnp.int32), places
    else:
        segments, positions = longer(rows.segment_ids), longer(rows.positions)
    return dataclasses.replace(whole, segment_ids=segments, positions=positions, most_segments=most_segments)


def check_compared(selector: str, params: PyTree) -> None:
    """Refuses to compare gradients where none is of a linear layer, or some are of routed experts.

    Args:
        selector: its name.
        params: the trained parameters.

    Raises:
        InputError: names the selector.
    """
    paths = selected_paths(params)
    if routed := [path for path in paths if layout.row(path).routed]:
        reason = (
            f"selector {selector!r} compares gradients as products of whole rows, which those of routed experts "
            f"({routed[0]}) are not; train the attention, or adapters"
        )
        raise InputError(reason, option="model.trainable")
    if not all(map(layout.is_linear, paths)):
        reason = f"selector {selector!r} compares gradients of the blocks' linear layers, of which none is trained"
        raise InputError(reason, option="model.trainable")


class TargetDraws:
    """Some rows of the target set for every step, in seeded epochs.

    Args:
        targets: the target set.
        source: its rows.
        rows: of a step; of a smaller set, all.
        seed: of the shuffles.
        mesh: the devices.
    """

    def __init__(self, targets: TargetSet, source: Source, rows: int, seed: int, mesh: Mesh):
        self._rows, self._loader = min(rows, len(targets.ids)), source.loader
        self._epochs = shuffled_epochs(targets.ids, "targets", seed)
        shards = row_shards(mesh)
        self._padding = -self._rows % shards

    def load(self, step: int) -> Batch:
        """The rows of a step, with rows of padding up to a multiple of the devices."""
        first = (step - 1) * self._rows
        ids = [self._epochs[place] for place in range(first, first + self._rows)]
        return self._loader.load(np.array(ids + [-1] * self._padding, np.int64))
