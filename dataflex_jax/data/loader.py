"""From rows to a batch on the devices, and the held-out rows in order."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int64

from dataflex_jax.data.batch import Batch, collated, on_devices, smallest_bucket
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
from dataflex_jax.sharding import batch_sharding, row_shards

_FEWEST_SLOTS = 8


def check_rows(mesh: Mesh, batch_size: int, grad_accumulation: int) -> None:
    """Refuses a batch that the devices cannot share equally.

    Raises:
        InputError: a microbatch is no multiple of the mesh's data x fsdp x expert.
    """
    shards = row_shards(mesh)
    if (batch_size // grad_accumulation) % shards:
        axes = "mesh.data x mesh.fsdp" + " x mesh.expert" * (mesh.shape["expert"] > 1)
        raise InputError(
            f"config.data.batch_size / grad_accumulation = {batch_size} / {grad_accumulation}: must be a multiple of "
            f"{axes} = {shards} devices"
        )


class Loader:
    """Gathers rows of the pool; every host reads only those of its own devices.

    All rows of a batch are padded to the smallest bucket that holds the longest one, which every host knows.

    Args:
        pool: the rows.
        mesh: the devices; rows are split over its data, fsdp and expert axes.
        extra: name -> function from a row's id to float32 [T] that is padded like the mask, such as cached losses.
    """

    def __init__(self, pool: Pool, mesh: Mesh, extra: Mapping[str, Callable[[int], np.ndarray]] | None = None):
        self._pool, self._mesh, self._extra = pool, mesh, extra or {}
        self._sharding = batch_sharding(mesh)
        # A program is compiled for each number of segments; only cuDNN has to know it.
        self._count_segments = pool.packed and mesh.devices.flat[0].platform == "gpu"

    def load(self, ids: Int64[np.ndarray, " B"], drawn_with: np.ndarray | None = None) -> Batch:
        """The batch of some rows, padded to T inputs; an id of -1 is a row of padding.

        Args:
            ids: of the rows.
            drawn_with: the proportions that they were drawn with, [K]; None: they were not drawn.
        """
        mine = np.zeros(ids.shape, bool)
        for index in self._sharding.addressable_devices_indices_map(ids.shape).values():
            mine[index] = True
        batch = self.gathered(ids, mine)
        if drawn_with is not None:
            batch = dataclasses.replace(batch, drawn_with=drawn_with.astype(np.float32))
        return on_devices(self._mesh, batch)

    def gathered(self, ids: Int64[np.ndarray, " B"], mine: Bool[np.ndarray, " B"], length: int | None = None) -> Batch:
        """The batch of `load` as NumPy arrays on this host.

        Args:
            ids: of the rows.
            mine: which of them are read; the others are padding that has their lengths and domains.
            length: T; None: the smallest bucket that holds them.
        """
        lengths = np.array([self._pool.length(i) if i >= 0 else 0 for i in ids], np.int32)
        gathered = [self._pool.row(int(i)) if own and i >= 0 else None for i, own in zip(ids, mine, strict=True)]
        domains = self._pool.domain_of(np.maximum(ids, 0))
        length = length or smallest_bucket(lengths, self._pool.buckets)
        batch = collated(gathered, length, domains, packed=self._pool.packed)
        # Of rows on other hosts too.
        batch = dataclasses.replace(batch, lengths=lengths)
        if self._count_segments:
            most = max(self._pool.examples(int(i)) if i >= 0 else 0 for i in ids)
            batch = dataclasses.replace(batch, most_segments=segment_slots(most))
        for name, values_of in self._extra.items():
            values = np.zeros(batch.mask.shape, np.float32)
            for row, i in enumerate(ids):
                if mine[row] and i >= 0:
                    values[row, : lengths[row]] = values_of(int(i))
            batch = dataclasses.replace(batch, **{name: values})
        return batch


def segment_slots(examples: int) -> int:
    """`Batch.most_segments` of rows of at most so many examples and padding: one of few numbers."""
    return max(_FEWEST_SLOTS, 1 << examples.bit_length())


def held_out_batches(domains: Sequence[Domain], batch_size: int, max_rows: int, mesh: Mesh) -> Iterator[Batch]:
    """All held-out rows of all domains in order, at most `max_rows` a domain, as `Loader.load` gives them.

    The last batch is padded with rows of mask 0.
    """
    places = [
        (number, domain.valid, i)
        for number, domain in enumerate(domains)
        for i in range(min(domain.valid.num_rows, max_rows))
    ]
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        missing = batch_size - len(batch)
        rows = [rows.row(i) for _, rows, i in batch] + [None] * missing
        numbers = [number for number, *_ in batch] + [0] * missing
        kind = domains[0].valid
        length = smallest_bucket([len(row.mask) if row else 0 for row in rows], kind.buckets)
        yield on_devices(mesh, collated(rows, length, numbers, packed=kind.packed))
