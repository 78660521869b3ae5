"""What one pass reads from: a file or records in memory (or a dataset, hub.py), each to be read again and again."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dataflex_jax.data.sources.files import (
    FORMATS,
    INSTRUCTION_FORMATS,
    Record,
    read_records,
    record_place,
    split_format,
)

HELD_OUT_NAMES = ("validation", "valid")


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
        _, suffix = split_format(self.path.name, FORMATS + INSTRUCTION_FORMATS)
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
