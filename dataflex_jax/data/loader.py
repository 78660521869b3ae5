"""From a plan to a batch on the devices, and the held-out rows in order."""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.rows import Row, bucket_of, padded
from dataflex_jax.data.sampler import Plan
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


def shuffled_epochs(source, name: str, seed: int) -> grain.MapDataset:
    """A domain's endless sequence: seeded shuffle, a new one each epoch; it does not depend on the other domains."""
    return grain.MapDataset.source(source).seed((seed + zlib.crc32(name.encode())) % 2**32).shuffle().repeat()


class Loader:
    """Gathers the rows of a plan; every host reads only those of its own devices.

    All rows of a batch are padded to the smallest bucket that holds the longest one, which every host knows from the
    plan.

    Args:
        domains: the K domains, with rows of one kind.
        seed: of the domains' shuffles.
        mesh: the devices; rows are split over its data and fsdp axes.
    """

    def __init__(self, domains: Sequence[Domain], seed: int, mesh: Mesh):
        self._rows = [domain.train for domain in domains]
        self._orders = [shuffled_epochs(range(domain.train.num_rows), domain.name, seed) for domain in domains]
        self._mesh = mesh
        self.num_rows = np.array([rows.num_rows for rows in self._rows])

    def load(self, plan: Plan) -> Batch:
        """The plan's batch, of B rows padded to T inputs.

        Returns:
            tokens int32 [B, T+1], mask float32 [B, T], lengths int32 [B] (inputs without padding), domain int32 [B],
            drawn_with float32 [K]; of packed rows also segment_ids and positions int32 [B, T].
        """
        sharding = batch_sharding(self._mesh)
        shape = (len(plan.domains),)
        mine = np.zeros(shape, bool)
        for index in sharding.addressable_devices_indices_map(shape).values():
            mine[index] = True
        places = [
            (self._rows[domain], self._orders[domain][int(position)])
            for domain, position in zip(plan.domains, plan.positions, strict=True)
        ]
        lengths = np.array([rows.length(i) for rows, i in places], np.int32)
        gathered = [rows.row(i) if own else None for (rows, i), own in zip(places, mine, strict=True)]
        kind = self._rows[0]
        batch = _host_batch(gathered, lengths, plan.domains, kind.buckets, packed=kind.packed)
        drawn_with = _placed(plan.drawn_with.astype(np.float32), replicated(self._mesh))
        return _on_devices(self._mesh, batch) | {"drawn_with": drawn_with}


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
