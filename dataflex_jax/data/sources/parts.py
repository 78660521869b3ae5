"""What one pass reads from: a file or records in memory (or a dataset, hub.py), each to be read again and again."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataflex_jax.data.sources.files import Record, read_records, record_place
from dataflex_jax.data.sources.names import split_format

logger = logging.getLogger(__name__)


class Part(Protocol):
    """A file or dataset: a re-readable sequence of records."""

    @property
    def size(self) -> int:
        """Bytes, for progress."""

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do; `hash_file(path)` is the digest of a whole file."""

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on; `columns` are the top-level fields wanted, `optional` those read if there."""

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""


@dataclasses.dataclass(frozen=True)
class FilePart:
    """One data file."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return self.path.stat().st_size

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        _, suffix = split_format(self.path.name)
        return suffix + ":" + hash_file(self.path)

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on."""
        return read_records(self.path, columns, start, optional)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return record_place(self.path, index)


@dataclasses.dataclass(frozen=True)
class RecordsPart:
    """Records held in memory (one domain of the built-in corpus, say)."""

    name: str
    rows: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)

    @functools.cached_property
    def _lines(self) -> tuple[bytes, ...]:
        return tuple(json.dumps(row).encode() for row in self.rows)

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return sum(map(len, self._lines))

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        del hash_file
        return "records:" + hashlib.blake2b(b"\n".join(self._lines), digest_size=16).hexdigest()

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on, with all their fields."""
        del columns, optional
        position = 0
        for index, (row, line) in enumerate(zip(self.rows, self._lines, strict=True)):
            position += len(line)
            if index >= start:
                yield Record(index, position, row, None)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return f"{self.name}: record {index}"


def file_parts(paths: Sequence[Path]) -> tuple[FilePart, ...]:
    """A part for each file."""
    return tuple(FilePart(path) for path in paths)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Which records of some parts are chosen: the same ones each time.

    Attributes:
        parts: read through once to count their records.
        columns: fields that their records have.
        count: of records; where there are fewer, all are chosen.
        at_random: whether they are drawn at random; otherwise they are the first.
    """

    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    count: int
    at_random: bool = True

    @functools.cached_property
    def chosen(self) -> tuple[set[int], ...]:
        """The numbers of the chosen records of each part."""
        every = [(n, record.index) for n, part in enumerate(self.parts) for record in part.records(self.columns, 0)]
        if self.at_random and self.count > len(every):
            place = self.parts[0].place(0)
            logger.warning("%s: a sample of %d records is asked for, but there are %d", place, self.count, len(every))
        chosen = tuple(set() for _ in self.parts)
        order = np.random.default_rng(0).permutation(len(every)) if self.at_random else range(len(every))
        for i in order[: self.count]:
            number, index = every[i]
            chosen[number].add(index)
        return chosen


@dataclasses.dataclass(frozen=True)
class SampledPart:
    """The chosen records of one part; they keep their numbers."""

    part: Part
    number: int
    sample: _Sample = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return self.part.size

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        which = "" if self.sample.at_random else "first "
        return f"{which}{self.sample.count} of {self.part.fingerprint(hash_file)}"

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Chosen records from number `start` on."""
        chosen = self.sample.chosen[self.number]
        return (record for record in self.part.records(columns, start, optional) if record.index in chosen)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return self.part.place(index)


def sampled(parts: Sequence[Part], columns: Sequence[str], count: int) -> tuple[SampledPart, ...]:
    """`count` records of all `parts` together, chosen at random once and for all; they have the fields `columns`."""
    sample = _Sample(tuple(parts), tuple(columns), count)
    return tuple(SampledPart(part, number, sample) for number, part in enumerate(parts))


def first(parts: Sequence[Part], columns: Sequence[str], count: int) -> tuple[SampledPart, ...]:
    """The first `count` records of all `parts` together; they have the fields `columns`."""
    sample = _Sample(tuple(parts), tuple(columns), count, at_random=False)
    return tuple(SampledPart(part, number, sample) for number, part in enumerate(parts))
