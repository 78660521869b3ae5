"""The training rows of all domains as one pool, the candidates that selectors choose among.

A row's id is its place in the pool: the rows of the first domain, then those of the second, and so on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.rows import ExampleRows, Row
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.stores.store import PART_BITS


class Group(NamedTuple):
    """Rows that are drawn as one: the ids from `start` up to `stop`."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.stop - self.start


class Pool:
    """The rows of one split ("train" or "valid") of some domains.

    Attributes:
        num_rows: N.
        offsets: id of each domain's first row, and N, int64 [K + 1].
        buckets: the lengths that batches are padded to.
        packed: whether the rows have segment ids and positions.
        split: "train" or "valid".
    """

    def __init__(self, domains: Sequence[Domain], split: str = "train"):
        self.domains, self.split = domains, split
        self._rows = [getattr(domain, split) for domain in domains]
        self.offsets = np.cumsum([0, *(rows.num_rows for rows in self._rows)], dtype=np.int64)
        self.num_rows = int(self.offsets[-1])
        self.buckets, self.packed = self._rows[0].buckets, self._rows[0].packed

    @property
    def natural(self) -> Float64[np.ndarray, " K"]:
        """Each domain's share of the rows."""
        return np.diff(self.offsets) / self.num_rows

    def domain_of(self, ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The domain's number of each row."""
        return np.searchsorted(self.offsets, ids, side="right") - 1

    def length(self, i: int) -> int:
        """Inputs of row `i`, found without reading it."""
        domain = int(self.domain_of(i))
        return self._rows[domain].length(i - int(self.offsets[domain]))

    def examples(self, i: int) -> int:
        """How many examples packed row `i` has."""
        domain = int(self.domain_of(i))
        return len(self._rows[domain].members(i - int(self.offsets[domain])))

    def row(self, i: int) -> Row:
        """Row `i`."""
        domain = int(self.domain_of(i))
        return self._rows[domain].row(i - int(self.offsets[domain]))

    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Inputs of each row."""
        return np.concatenate([rows.lengths() for rows in self._rows])

    def records(self) -> Int64[np.ndarray, " N"] | None:
        """Each example's record number in its domain's source; None for rows of documents, which have none."""
        if not all(isinstance(rows, ExampleRows) for rows in self._rows):
            return None
        return np.concatenate([rows.examples.ids for rows in self._rows])

    def where(self, i: int) -> str:
        """Row `i` in words, such as "record 3 of 'algebra'": by its number in the source, or of documents in the split.

        Args:
            i: its id.
        """
        domain = int(self.domain_of(i))
        rows, number = self._rows[domain], i - int(self.offsets[domain])
        name = self.domains[domain].name
        if not isinstance(rows, ExampleRows):
            return f"row {number} of {name!r}"
        part, record = divmod(int(rows.examples.ids[number]), 1 << PART_BITS)
        return f"record {record} of {f'part {part} of ' if part else ''}{name!r}"

    def conversations(self, ids: Int64[np.ndarray, " n"]) -> dict[int, Conversation] | None:
        """The conversation of each example, by its id, read anew; None for rows of documents."""
        if self.records() is None:
            return None
        wanted, found, place = set(ids.tolist()), {}, 0
        for domain in self.domains:
            for record in domain.store.records(self.split):
                if place in wanted:
                    found[place] = domain.store.conversation(record)
                place += 1
        return found

    def groups(self, *, by_domain: bool) -> tuple[Group, ...]:
        """Each domain, or the whole pool as one."""
        if not by_domain:
            return (Group("pool", 0, self.num_rows),)
        bounds = self.offsets.tolist()
        return tuple(
            Group(domain.name, start, stop)
            for domain, start, stop in zip(self.domains, bounds[:-1], bounds[1:], strict=True)
        )
