"""Rows that are given as they are, in memory: texts or chats of a notebook, or what a model has generated."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import Row

_SHORTEST = 16


class ListedRows:
    """A list of rows; see `rows.Rows`.

    Args:
        rows: at least one, each of at least one input, none of them packed.
        bytes_per_target: UTF-8 bytes of text that a token in the loss stands for, on average.
    """

    packed = False

    def __init__(self, rows: Sequence[Row], bytes_per_target: float = 1.0):
        self._rows, self.num_rows, self.bytes_per_target = tuple(rows), len(rows), bytes_per_target
        longest, self.buckets = int(self.lengths().max()), (_SHORTEST,)
        while self.buckets[-1] < longest:
            self.buckets += (2 * self.buckets[-1],)

    def length(self, i: int) -> int:
        """Inputs of row `i`."""
        return len(self._rows[i].mask)

    def lengths(self) -> Int64[np.ndarray, " num_rows"]:
        """Inputs of every row."""
        return np.array([len(row.mask) for row in self._rows], np.int64)

    def row(self, i: int) -> Row:
        """Row `i`."""
        return self._rows[i]

    def pool(self, name: str = "rows") -> Pool:
        """These rows alone as a pool of one domain."""
        return Pool([Domain(name, "", self, self, None)])


def input_rows(encoded: Sequence[Sequence[int]]) -> ListedRows:
    """Token ids all of which a model reads: none of a row is predicted only, and none counts in a loss."""
    return ListedRows([Row(np.array([*ids, 0], np.int32), np.zeros(len(ids), bool)) for ids in encoded])
