"""What a batch is made of: rows with random access, whatever the kind of data, and their padding to static shapes.

A row of n tokens has n - 1 inputs and as many predictions. Batches are padded on the right to one of a few lengths T
(`buckets`), so that a run compiles few shapes: all rows of a batch to the smallest one that holds its longest row.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dataflex_jax.data.stores.store import Split


class Row(NamedTuple):
    """One row, not padded.

    Attributes:
        tokens: the inputs, and the last prediction.
        mask: where `tokens[t + 1]` counts in the loss.
        segment_ids: from 1, of the packed example that input t belongs to; None: the row is one text.
        positions: of input t in its example; None: in the row.
    """

    tokens: Int32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n-1"]
    segment_ids: Int32[np.ndarray, " n-1"] | None = None
    positions: Int32[np.ndarray, " n-1"] | None = None


class Rows(Protocol):
    """The rows of one split of one domain.

    Attributes:
        num_rows: how many.
        buckets: the lengths T that batches of them are padded to, increasing.
        packed: whether the rows have segment ids and positions.
        bytes_per_target: UTF-8 bytes of text that a token in the loss stands for, on average.
    """

    num_rows: int
    buckets: tuple[int, ...]
    packed: bool
    bytes_per_target: float

    def length(self, i: int) -> int:
        """Inputs of row `i`, found without reading it."""

    def lengths(self) -> Int64[np.ndarray, " num_rows"]:
        """Inputs of every row."""

    def row(self, i: int) -> Row:
        """Row `i`."""


class DocumentRows:
    """Pretraining: `seq_len` inputs from anywhere in a domain's documents.

    Args:
        tokens: of one split.
        seq_len: T.
        partial: whether the last tokens, which do not fill a row, are one too.
    """

    packed = False

    def __init__(self, tokens: Split, seq_len: int, *, partial: bool = False):
        self._tokens, self._seq_len, self.partial = tokens, seq_len, partial
        self.num_rows = -(-max(tokens.num_tokens - 1, 0) // seq_len) if partial else tokens.num_rows(seq_len)
        self.buckets = (seq_len,)
        self.bytes_per_target = tokens.num_bytes / max(tokens.num_tokens, 1)

    def length(self, i: int) -> int:
        """Inputs of row `i`."""
        return min(self._seq_len, self._tokens.num_tokens - 1 - i * self._seq_len)

    def lengths(self) -> Int64[np.ndarray, " num_rows"]:
        """Inputs of every row."""
        return np.minimum(self._seq_len, self._tokens.num_tokens - 1 - np.arange(self.num_rows) * self._seq_len)

    def row(self, i: int) -> Row:
        """Row `i`."""
        start, length = i * self._seq_len, self.length(i)
        tokens = self._tokens.tokens[start : start + length + 1].astype(np.int32)
        return Row(tokens, np.ones(length, bool))


class ExampleRows:
    """Instruction data: one example a row."""

    packed = False

    def __init__(self, examples: Split, buckets: tuple[int, ...]):
        self.examples, self.buckets = examples, buckets
        self.num_rows = examples.num_documents
        self.bytes_per_target = examples.num_bytes / max(examples.num_targets, 1)

    def length(self, i: int) -> int:
        """Inputs of row `i`."""
        return int(self.examples.lengths[i]) - 1

    def lengths(self) -> Int64[np.ndarray, " num_rows"]:
        """Inputs of every row."""
        return self.examples.lengths - 1

    def row(self, i: int) -> Row:
        """Row `i`."""
        tokens, targets = self.examples.example(i)
        return Row(tokens, targets[1:])


class PackedRows:
    """Instruction data: several examples a row, kept apart by segment ids.

    Which examples share a row does not depend on a seed. No example is cut; all rows but one are at least half full.

    Args:
        examples: of one split, each of at most `length` + 1 tokens.
        length: T.
    """

    packed = True

    def __init__(self, examples: Split, length: int):
        self.examples, self.buckets = examples, (length,)
        self._order, self._starts = pack(examples.lengths, length + 1)
        self.num_rows = len(self._starts) - 1
        self.bytes_per_target = examples.num_bytes / max(examples.num_targets, 1)

    def members(self, i: int) -> Int64[np.ndarray, " k"]:
        """The examples of row `i`, in their order in it."""
        return self._order[self._starts[i] : self._starts[i + 1]]

    def length(self, i: int) -> int:
        """Inputs of row `i`."""
        return int(self.examples.lengths[self.members(i)].sum()) - 1

    def lengths(self) -> Int64[np.ndarray, " num_rows"]:
        """Inputs of every row."""
        return np.add.reduceat(self.examples.lengths[self._order], self._starts[:-1]) - 1

    def row(self, i: int) -> Row:
        """Row `i`."""
        tokens, targets = zip(*(self.examples.example(int(j)) for j in self.members(i)), strict=True)
        lengths = [len(t) for t in tokens]
        # An example's first token is never a target, so nothing is predicted from the example before it.
        return Row(
            np.concatenate(tokens),
            np.concatenate(targets)[1:],
            np.repeat(np.arange(1, len(tokens) + 1, dtype=np.int32), lengths)[:-1],
            np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[:-1],
        )


def pack(
    lengths: Int64[np.ndarray, " N"], capacity: int
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " rows+1"]]:
    """Groups sequences into rows of at most `capacity` by best-fit decreasing.

    Returns:
        (order, starts): row r holds the sequences `order[starts[r]:starts[r + 1]]`.

    Raises:
        ValueError: a sequence longer than `capacity`.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # {room left: rows}
    rooms: list[int] = []  # the keys of `with_room` that have rows, increasing
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if length > capacity:
            raise ValueError(f"sequence {i} has {length} tokens, more than a row of {capacity}")
        fit = bisect.bisect_left(rooms, length)
        if fit == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[fit]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[fit]
        rows[row].append(i)
        left = room - length
        if left:
            if not with_room.setdefault(left, []):
                bisect.insort(rooms, left)
            with_room[left].append(row)
    order = np.array([i for row in rows for i in row], np.int64)
    return order, np.cumsum([0, *map(len, rows)], dtype=np.int64)


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets` that holds `length` inputs.

    Raises:
        ValueError: none does.
    """
    at = bisect.bisect_left(buckets, length)
    if at == len(buckets):
        raise ValueError(f"a row of {length} inputs is longer than the largest bucket, {buckets[-1]}")
    return buckets[at]
