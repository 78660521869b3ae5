"""From a plan to a batch on the devices, and the held-out rows in order."""

import zlib
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dataflex_jax.data.sampler import Plan
from dataflex_jax.data.store import DomainStore, TokenArray
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


class Rows:
    """A random-access Grain source: row i of a domain's tokens, int32 [seq_len + 1]."""

    def __init__(self, tokens: TokenArray, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return self._tokens.num_rows(self._seq_len)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._tokens.row(int(index), self._seq_len)


def shuffled_epochs(source, name: str, seed: int) -> grain.MapDataset:
    """A domain's endless sequence: seeded shuffle, a new one each epoch; it does not depend on the other domains."""
    return grain.MapDataset.source(source).seed((seed + zlib.crc32(name.encode())) % 2**32).shuffle().repeat()


class Loader:
    """Gathers the rows of a plan; every host reads only those of its own devices.

    Args:
        stores: the K domains.
        seq_len: T, tokens a row.
        seed: of the domains' shuffles.
        mesh: the devices; rows are split over its data and fsdp axes.

    Raises:
        InputError: a domain with less than one row.
    """

    def __init__(self, stores: Sequence[DomainStore], seq_len: int, seed: int, mesh: Mesh):
        for store in stores:
            if store.train.num_rows(seq_len) < 1:
                raise InputError(
                    f"domain {store.name!r} has {store.train.num_tokens} training tokens, less than one row of "
                    f"config.data.seq_len + 1 = {seq_len + 1}"
                )
        self._sequences = [shuffled_epochs(Rows(store.train, seq_len), store.name, seed) for store in stores]
        self._seq_len, self._mesh = seq_len, mesh
        self.num_rows = np.array([store.train.num_rows(seq_len) for store in stores])

    def load(self, plan: Plan) -> Batch:
        """The plan's batch: tokens int32 [B, T+1], mask float32 [B, T], domain int32 [B], drawn_with float32 [K]."""
        sharding = batch_sharding(self._mesh)
        shape = (len(plan.domains),)
        mine = np.zeros(shape, bool)
        for index in sharding.addressable_devices_indices_map(shape).values():
            mine[index] = True
        tokens = np.zeros((*shape, self._seq_len + 1), np.int32)
        for b in np.flatnonzero(mine):
            tokens[b] = self._sequences[plan.domains[b]][int(plan.positions[b])]
        mask = np.ones((*shape, self._seq_len), np.float32)
        drawn_with = _placed(plan.drawn_with.astype(np.float32), replicated(self._mesh))
        return _on_devices(self._mesh, tokens, mask, plan.domains) | {"drawn_with": drawn_with}


def _on_devices(mesh: Mesh, tokens: np.ndarray, mask: np.ndarray, domains: np.ndarray) -> Batch:
    values = {"tokens": tokens, "mask": mask, "domain": domains.astype(np.int32)}
    return {k: _placed(v, batch_sharding(mesh)) for k, v in values.items()}


def _placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    # Not device_put: over several hosts it compares the values by a collective of its own, which must not come between
    # the train step's from another thread.
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def held_out_batches(
    stores: Sequence[DomainStore], seq_len: int, batch_size: int, max_rows: int, mesh: Mesh
) -> Iterator[Batch]:
    """All held-out rows of all domains in order, at most `max_rows` a domain; the last row of a domain and the last batch
    are padded, with mask 0."""
    rows = []
    for domain, store in enumerate(stores):
        tokens = store.valid.tokens
        starts = range(0, max(len(tokens) - 1, 0), seq_len)[:max_rows]
        rows += [(domain, tokens[start : start + seq_len + 1]) for start in starts]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        tokens = np.zeros((batch_size, seq_len + 1), np.int32)
        mask = np.zeros((batch_size, seq_len), np.float32)
        domains = np.zeros(batch_size, np.int32)
        for b, (domain, row) in enumerate(batch):
            tokens[b, : len(row)], mask[b, : len(row) - 1], domains[b] = row, 1, domain
        yield _on_devices(mesh, tokens, mask, domains)
