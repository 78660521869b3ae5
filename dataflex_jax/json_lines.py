"""Exact, append-only files of JSON objects, one a line, of which a killed process loses at most the last.

Everything here runs on the host and takes Python, numpy or JAX values; nothing is traced.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dataflex_jax.errors import InputError, TrainingError, one_line
from dataflex_jax.files import NULLABLE, to_json
from dataflex_jax.foreign import parse_json

_BLOCK = 1 << 20


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, in order; a torn last line (no newline at its end) is left out.

    Raises:
        InputError: the file cannot be read, or a complete line is not a JSON object; names file and line.
    """
    path, records = Path(path), []
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    records.append(parse_object(line))
    except ValueError as error:
        raise InputError(f"{path}:{len(records) + 1}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a JSON-lines file is expected") from error
    return records


class Written(NamedTuple):
    """How far a file of lines had come.

    Attributes:
        size: bytes.
        lines: their number.
        crc32: of all bytes.
    """

    size: int = 0
    lines: int = 0
    crc32: int = 0

    def after(self, data: bytes) -> Written:
        """The same with more of the file."""
        return Written(self.size + len(data), self.lines + data.count(b"\n"), zlib.crc32(data, self.crc32))


class JsonlWriter:
    """Appends one JSON object a line; each line reaches the file as it is written.

    A killed process therefore loses at most the line it was writing. A torn last line left by such a process is
    removed when the file is opened again.

    Args:
        path: the file, made with its folder when missing and appended to when present.
        nullable: fields at and below which a NaN or infinity is written as null; elsewhere it is refused.
    """

    def __init__(self, path: str | os.PathLike[str], *, nullable: Collection[str] = NULLABLE):
        self.path = Path(path)
        self._nullable = frozenset(nullable)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()
        self._written: Written | None = None
        self._cut(_complete_length(self._file))

    def _opened(self) -> BinaryIO:
        return open(self.path, "ab+")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record.

        Raises:
            TrainingError: a NaN or infinity in a field that is not nullable; names file and field. Nothing is written.
        """
        try:
            line = to_json(record, self._nullable)
        except TrainingError as error:
            step = f" at step {record['step']}" if "step" in record else ""
            raise TrainingError(f"{self.path.name}{step}: {error}") from error
        data = (line + "\n").encode()
        self._file.write(data)
        self._file.flush()
        if self._written is not None:
            self._written = self._written.after(data)

    def synced(self) -> Written:
        """How far the file has come, once all of it is on the disk."""
        os.fsync(self._file.fileno())
        if self._written is None:
            self._written = _measured(self._file, self._size())
        return self._written

    def truncate_after(
        self,
        step: int,
        redone: Callable[[dict[str, Any]], bool] = lambda record: False,
        written: Written | None = None,
    ) -> str | None:
        """Keeps the lines whose `step` is at most `step`, byte for byte; all or nothing if the process is killed.

        Args:
            step: the last one to keep.
            redone: lines that are not kept either.
            written: how far the file had come then, as `synced` said. Where it is not that any more, only whole
                lines that are there once are kept. None: not known; the end alone is read.

        Returns:
            What of the lines up to `step` was damaged, in words; None: nothing, as far as is known.

        Raises:
            InputError: a line is not a JSON object with a `step`; names file and line.
        """
        if written is None:
            end = self._size()
            for start, line in _backwards(self._file, end):
                try:
                    record = _record(line)
                except ValueError as error:
                    number = _measured(self._file, start).lines + 1
                    raise InputError(f"{self.path}:{number}: {error}") from error
                if record["step"] <= step and not redone(record):
                    break
                end = start
            self._cut(end)
        elif self._size() < written.size or _measured(self._file, written.size) != written:
            return self._repaired(step, redone, written)
        else:
            self._cut(written.size)
            self._written = written
        return None

    def _repaired(self, step: int, redone: Callable[[dict[str, Any]], bool], written: Written) -> str:
        """Drops what is no line up to `step` or there already, and says what this leaves."""
        seen, found = set(), Written()
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self._file.seek(0)
        try:
            with open(partial, "wb") as file:
                for line in self._file:
                    try:
                        record = _record(line)
                    except ValueError:
                        continue
                    if record["step"] <= step and not redone(record) and line not in seen:
                        seen.add(line)
                        file.write(line)
                        found = found.after(line)
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self._file, self._written = self._opened(), None
        if found == written:
            return f"{self.path}: damaged or doubled lines up to step {step} were taken out; none is missing"
        missing = max(written.lines - found.lines, 0)
        return (
            f"{self.path}: {missing or 'some'} of the {written.lines} lines up to step {step} are missing or not what "
            "was written; plots and report go without them"
        )

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _cut(self, size: int) -> None:
        if size < self._size():
            os.ftruncate(self._file.fileno(), size)
            self._written = None

    def close(self) -> None:
        """Closes the file; nothing can be written afterwards."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _record(line: bytes) -> dict[str, Any]:
    """A line of a run folder's file.

    Raises:
        ValueError: it is none.
    """
    record = parse_object(line)
    if not isinstance(record.get("step"), int) or isinstance(record["step"], bool):
        raise ValueError("no integer `step`; every line of this file must have one")
    return record


def parse_object(line: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ValueError: it holds none.
    """
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({one_line(error)}); one object a line is expected") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}; one object a line is expected")
    return value


def _measured(file: BinaryIO, size: int) -> Written:
    """Of the first `size` bytes of a file."""
    file.seek(0)
    found = Written()
    while data := file.read(min(_BLOCK, size - found.size)):
        found = found.after(data)
    return found


def _backwards(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """(place, line) of the lines before `end`, where one ends, from the last to the first."""
    block, stop = b"", 0
    while end > 0 or stop > 0:
        newline = block.rfind(b"\n", 0, max(stop - 1, 0))
        if newline < 0 and end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start) + block[:stop]
            end, stop = start, len(block)
            continue
        yield end + newline + 1, block[newline + 1 : stop]
        stop = newline + 1


def _complete_length(file: BinaryIO) -> int:
    """Bytes of a file up to and with its last newline; reads no more than the torn part needs."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
