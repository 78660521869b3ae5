"""Signals of `gradient_model`'s models on rows that are arrays: two domains, and a target set in two groups."""

from typing import NamedTuple

import jax
import numpy as np

from dataflex_jax.data.batch import Batch, collated
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import Row
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.signals.sweep import Sweeper, source
from tests.helpers.gradient_model import MODEL

LONGEST = 12
TARGET_IDS, TARGET_GROUPS, TARGET_NAMES = (4, 0, 3), (0, 1, 1), ("algebra", "law")


class ArrayRows(NamedTuple):
    """Rows in memory; see `dataflex_jax.data.rows.Rows`."""

    rows: list[Row]
    buckets: tuple[int, ...] = (6, LONGEST)
    packed: bool = False
    bytes_per_target: float = 1.0

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def length(self, i: int) -> int:
        return len(self.rows[i].mask)

    def lengths(self) -> np.ndarray:
        return np.array([len(row.mask) for row in self.rows])

    def row(self, i: int) -> Row:
        return self.rows[i]


def random_rows(count: int, seed: int) -> ArrayRows:
    """Rows of different lengths whose first input is a prompt; the last row has no target."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in rng.integers(3, LONGEST + 1, count):
        rows.append(Row(rng.integers(1, MODEL.vocab_size, n + 1).astype(np.int32), np.arange(n) > 0))
    rows[-1] = rows[-1]._replace(mask=np.zeros_like(rows[-1].mask))
    return ArrayRows(rows)


def pool_of(**domains: ArrayRows) -> Pool:
    """The rows as a pool of domains without held-out ones."""
    return Pool([Domain(name, name, rows, ArrayRows([]), None) for name, rows in domains.items()])


POOL = pool_of(books=random_rows(5, 0), code=random_rows(4, 1))
TARGET_POOL = pool_of(tasks=random_rows(6, 2))


def whole_batch(pool: Pool = POOL) -> Batch:
    """All rows of the pool as one batch, longer than any of a sweep."""
    ids = np.arange(pool.num_rows)
    return jax.tree.map(np.asarray, collated([pool.row(i) for i in ids], LONGEST + 3, pool.domain_of(ids)))


def signals_of(subject: Subject, *, rows: int = 2, **options) -> ModelSignals:
    """The signals of a model on one device, in batches of `rows`; `options` as for `ModelSignals`."""
    mesh = make_mesh({}, jax.devices()[:1])
    target_set = TargetSet(TARGET_POOL, np.array(TARGET_IDS), np.array(TARGET_GROUPS), TARGET_NAMES)
    options = {"targets": (target_set, source(TARGET_POOL, mesh))} | options
    return ModelSignals(subject, Sweeper(mesh, rows=rows), source(POOL, mesh), **options)
