"""From rows to a batch on the devices, and the held-out rows in order."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int64

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import Row, bucket_of, padded
from dataflex_jax.errors import InputError
from dataflex_jax.sharding import batch_sharding, replicated

Batch = dict[str, jax.Array]


def check_rows(mesh: Mesh, batch_size: int, grad_accumulation: int) -> None:
    """Refuses a batch that the devices cannot share equally.

    Raises:
        InputError: a microbatch is no multiple of the mesh's data x fsdp.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch_size // grad_accumulation) % shards:
        raise InputError(
            f"config.data.batch_size / grad_accumulation = {batch_size} / {grad_accumulation}: must be a multiple of "
            f"mesh.data x mesh.fsdp = {shards} devices"
        )


class Loader:
    """Gathers rows of the pool; every host reads only those of its own devices.

    All rows of a batch are padded to the smallest bucket that holds the longest one, which every host knows.

    Args:
        pool: the rows.
        mesh: the devices; rows are split over its data and fsdp axes.
        extra: name -> function from a row's id to float32 [T] that is padded like the mask, such as cached losses.
    """

    def __init__(self, pool: Pool, mesh: Mesh, extra: Mapping[str, Callable[[int], np.ndarray]] | None = None):
        self._pool, self._mesh, self._extra = pool, mesh, extra or {}
        self._sharding = batch_sharding(mesh)

    def load(self, ids: Int64[np.ndarray, " B"], drawn_with: np.ndarray) -> Batch:
        """The batch of some rows, padded to T inputs; an id of -1 is a row of padding.

        Args:
            ids: of the rows.
            drawn_with: the proportions that they were drawn with, [K].

        Returns:
            tokens int32 [B, T+1], mask float32 [B, T], lengths int32 [B] (inputs without padding), domain int32 [B],
            drawn_with float32 [K]; of packed rows also segment_ids and positions int32 [B, T]; `extra` float32 [B, T].
        """
        mine = np.zeros(ids.shape, bool)
        for index in self._sharding.addressable_devices_indices_map(ids.shape).values():
            mine[index] = True
        lengths = np.array([self._pool.length(i) if i >= 0 else 0 for i in ids], np.int32)
        gathered = [self._pool.row(int(i)) if own and i >= 0 else None for i, own in zip(ids, mine, strict=True)]
        domains = self._pool.domain_of(np.maximum(ids, 0))
        batch = _host_batch(gathered, lengths, domains, self._pool.buckets, packed=self._pool.packed)
        for name, values_of in self._extra.items():
            batch[name] = np.zeros(batch["mask"].shape, np.float32)
            for row, i in enumerate(ids):
                if mine[row] and i >= 0:
                    batch[name][row, : lengths[row]] = values_of(int(i))
        drawn = _placed(drawn_with.astype(np.float32), replicated(self._mesh))
        return _on_devices(self._mesh, batch) | {"drawn_with": drawn}


def _host_batch(
    rows: Sequence[Row | None], lengths: np.ndarray, domains: np.ndarray, buckets: Sequence[int], *, packed: bool
) -> dict[str, np.ndarray]:
    batch = padded(rows, bucket_of(int(lengths.max()), buckets), packed=packed)
    return batch | {"lengths": lengths, "domain": np.asarray(domains, np.int32)}


def _on_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> Batch:
    return {k: _placed(v, batch_sharding(mesh)) for k, v in batch.items()}


def _placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    # Not device_put: over several hosts it compares the values by a collective of its own, which must not come between
    # the train step's from another thread.
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def held_out_batches(domains: Sequence[Domain], batch_size: int, max_rows: int, mesh: Mesh) -> Iterator[Batch]:
    """All held-out rows of all domains in order, at most `max_rows` a domain, as `Loader.load` gives them but for
    drawn_with. The last batch is padded with rows of mask 0."""
    places = [
        (number, domain.valid, i)
        for number, domain in enumerate(domains)
        for i in range(min(domain.valid.num_rows, max_rows))
    ]
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        missing = batch_size - len(batch)
        rows = [rows.row(i) for _, rows, i in batch] + [None] * missing
        lengths = np.array([len(row.mask) if row else 0 for row in rows], np.int32)
        numbers = np.array([number for number, *_ in batch] + [0] * missing)
        kind = domains[0].valid
        yield _on_devices(mesh, _host_batch(rows, lengths, numbers, kind.buckets, packed=kind.packed))
