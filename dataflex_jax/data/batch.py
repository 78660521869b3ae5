"""A batch: what the train step, evaluations and sweeps are given."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from dataflex_jax.data.rows import Row, bucket_of
from dataflex_jax.sharding import batch_sharding, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T inputs and as many predictions, padded on the right; K domains.

    Attributes:
        tokens: ids; the first T are read, the last T predicted.
        mask: 1 where a prediction counts in the loss.
        lengths: inputs of each row without padding.
        domain: the domain of each row, in [0, K).
        drawn_with: the proportions that the batch was drawn with; None where it was not drawn.
        segment_ids: of packed rows, from 1, of the example that an input belongs to.
        positions: of packed rows, of an input in its example.
        reference_losses: token losses under a reference model, where they are known.
        record_numbers: of the records that the predictions belong to, where a policy wants them.
        targets: rows of the target set that a selector compares these rows with; None: it compares with none.
        most_segments: of packed rows, how many different segment ids a row has at most, padding's among them; None:
            unknown, and cuDNN is not asked to attend.
    """

    tokens: Int[Array, "B T+1"]
    mask: Float[Array, "B T"]
    lengths: Int[Array, " B"]
    domain: Int[Array, " B"]
    drawn_with: Float[Array, " K"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None
    reference_losses: Float[Array, "B T"] | None = None
    record_numbers: Float[Array, "B T"] | None = None
    targets: "Batch | None" = None
    most_segments: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def row_tokens(self) -> Float[Array, " B"]:
        """How many predictions of each row count in the loss."""
        return jnp.sum(self.mask, axis=1)

    @property
    def real_inputs(self) -> Float[Array, "B T"]:
        """1 where an input is no padding."""
        return (jnp.arange(self.mask.shape[1]) < self.lengths[:, None]).astype(jnp.float32)

    def with_last_inputs(self) -> "Batch":
        """The same rows with the last token of each, which is only predicted here, as a further input: T + 1 inputs."""
        real = self.lengths > 0
        here = (jnp.arange(self.mask.shape[1] + 1) == self.lengths[:, None]) & real[:, None]

        def continued(values: Int[Array, "B T"] | None, more: int) -> Int[Array, "B T+1"] | None:
            if values is None:
                return None
            last = jnp.take_along_axis(values, jnp.maximum(self.lengths - 1, 0)[:, None], axis=1)
            return jnp.where(here, last + more, jnp.pad(values, ((0, 0), (0, 1))))

        return dataclasses.replace(
            self,
            tokens=jnp.pad(self.tokens, ((0, 0), (0, 1))),
            mask=jnp.pad(self.mask, ((0, 0), (0, 1))),
            lengths=self.lengths + real,
            segment_ids=continued(self.segment_ids, 0),
            positions=continued(self.positions, 1),
            reference_losses=None,
            record_numbers=None,
        )

    def rows_alone(self) -> "Batch":
        """The fields whose leading axis is the rows', to be split or mapped over."""
        return dataclasses.replace(self, drawn_with=None, targets=None)


def split(rows: PyTree, parts: int) -> PyTree:
    """Arrays of rows [B, ...] -> [parts, B / parts, ...]; row b is in part `b % parts`, so that devices keep theirs."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), rows)


def joined(parts: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def collated(rows: Sequence[Row | None], length: int, domains: Sequence[int], *, packed: bool = False) -> Batch:
    """Rows as one batch of NumPy arrays, padded on the right with token 0, mask 0, segment 0.

    Args:
        rows: None makes a row of padding, as does a row whose arrays live on another host.
        length: T.
        domains: of the rows.
        packed: whether the rows have segment ids and positions.
    """
    arrays = {
        "tokens": np.zeros((len(rows), length + 1), np.int32),
        "mask": np.zeros((len(rows), length), np.float32),
    }
    if packed:
        arrays |= {name: np.zeros((len(rows), length), np.int32) for name in ("segment_ids", "positions")}
    for b, row in enumerate(rows):
        if row is not None:
            for name, values in arrays.items():
                value = getattr(row, name)
                values[b, : len(value)] = value
    lengths = np.array([0 if row is None else len(row.mask) for row in rows], np.int32)
    return Batch(lengths=lengths, domain=np.asarray(domains, np.int32), **arrays)


def smallest_bucket(lengths: Sequence[int], buckets: Sequence[int]) -> int:
    """The smallest of `buckets` that holds the longest of rows with these numbers of inputs."""
    return bucket_of(int(max(lengths)), buckets)


def on_devices(mesh: Mesh, batch: Batch) -> Batch:
    """A batch of NumPy arrays, equal on every host, as global arrays: rows over its `BATCH_AXES`, the rest whole."""
    rows = jax.tree.map(lambda value: _placed(value, batch_sharding(mesh)), batch.rows_alone())
    if batch.drawn_with is None:
        return rows
    return dataclasses.replace(rows, drawn_with=_placed(batch.drawn_with, replicated(mesh)))


def _placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    # Not device_put: over several hosts it compares the values by a collective of its own, which must not come between
    # the train step's from another thread.
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
