"""Readers of data files: one record at a time whatever the format, never a whole file in memory.

JSONL (plain or compressed: one record a line), JSON (arrays of records, or one record a line), Parquet (one a row) and
plain text (the whole file is one record). Faults of a file (missing, truncated, corrupt) raise `InputError`; faults of
one record are handed on in `Record.problem`, because `data.on_bad_record` says whether they stop the run.
"""

import bisect
import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dataflex_jax.data.sources.names import shown, split_format
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import next_json, parse_json, refuse_pointer

MAX_RECORD_BYTES = 1 << 28  # of one line, array element or text file, decompressed
_TOO_LONG = f"longer than {MAX_RECORD_BYTES >> 20} MiB; split it into several"
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_PARQUET_BYTES = 32 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw: _Streams(raw, bz2.BZ2Decompressor),
    ".xz": lambda raw: _Streams(raw, lzma.LZMADecompressor),
}


class Record(NamedTuple):
    """One line, row or file. `fields` is None exactly when `problem` says why."""

    index: int  # from 0, blank lines included
    position: int  # bytes of the file read so far (of the compressed file, if it is)
    fields: Mapping[str, Any] | None
    problem: str | None
    filled: bool = False  # whether fields that are not there may stand as null, as in tables


def record_place(path: Path, index: int) -> str:
    """Where record `index` lies, for messages: `path:line`, `path: row N`, `path: record N`, or a text file's path."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        return f"{shown(path)}: row {index}"
    if _is_json(path):
        return f"{shown(path)}: record {index}"
    return shown(path) if suffix == ".txt" else f"{shown(path)}:{index + 1}"


def read_records(path: Path, columns: Sequence[str], start: int = 0, optional: Sequence[str] = ()) -> Iterator[Record]:
    """Records of one file from record `start` on, in order.

    Args:
        path: a file whose name ends in one of `FORMATS`.
        columns: the top-level fields wanted. A Parquet file must have them and only they are read; the first one is the
            field in which a text file's content is handed back.
        start: records to pass over.
        optional: further fields, read from a Parquet file where it has them.

    Raises:
        InputError: the file is missing, empty, unreadable, truncated or corrupt, or a Parquet file lacks a column.
    """
    with faults_named(path):
        if path.exists() and not path.is_file():
            raise InputError(f"{shown(path)}: not a file")
        if path.stat().st_size == 0:
            raise InputError(f"{shown(path)}: the file is empty; delete it or replace it with a complete one")
        refuse_pointer(path)
        suffix = _suffix(path)
        if suffix == ".parquet":
            yield from _parquet_records(path, columns, start, optional)
        elif suffix == ".txt":
            if start == 0:
                yield _text_record(path, columns[0])
        elif _is_json(path) and _is_array(path):
            yield from _array_records(path, start)
        else:
            yield from _line_records(path, start)


@contextlib.contextmanager
def faults_named(name: str | Path) -> Iterator[None]:
    """Makes an `InputError` that names the file of what goes wrong with reading it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decompressors and Arrow have a dozen kinds of them
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{shown(name)}: cannot be read, or is truncated or corrupt: {reason}") from error


def _suffix(path: Path) -> str:
    return (split_format(path.name) or ("", ""))[1]


def _is_json(path: Path) -> bool:
    return re.match(r"\.json(\.|$)", _suffix(path)) is not None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, io.BufferedReader]]:
    """The file, whose position tells how far it is read, and its content decompressed."""
    packing = next((packing for packing in (*_DECOMPRESSORS, ".zst") if _suffix(path).endswith(packing)), None)
    with contextlib.ExitStack() as stack:
        if packing == ".zst":
            import pyarrow as pa

            # zstandard's own stream reader ends without an error inside a truncated frame; Arrow's raises.
            raw = stack.enter_context(pa.OSFile(str(path)))
            content = stack.enter_context(pa.CompressedInputStream(raw, "zstd"))
        else:
            raw = stack.enter_context(open(path, "rb", buffering=0))
            content = stack.enter_context(_DECOMPRESSORS[packing](raw)) if packing else raw
        yield raw, stack.enter_context(io.BufferedReader(content, _READ_BYTES))


class _Streams(io.RawIOBase):
    """What bz2 or xz streams hold, one after the other. Python's own readers end without an error at a damaged one."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]):
        self._raw, self._new, self._stream = raw, new, new()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the beginning of `buffer`: the number of bytes, 0 at the end."""
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._after_stream()
                if not packed:
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input:
                packed = self._raw.read(_READ_BYTES)
                if not packed:
                    raise EOFError("it ends in the middle of a stream")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _after_stream(self) -> bytes:
        """What follows the stream that has ended, and the zeros with which xz may pad it."""
        rest = self._stream.unused_data.lstrip(b"\0")
        while not rest and (more := self._raw.read(_READ_BYTES)):
            rest = more.lstrip(b"\0")
        return rest


def _line_records(path: Path, start: int) -> Iterator[Record]:
    hint = "; a .json file holds arrays, or one object a line" if _is_json(path) else ""
    with _opened(path) as (raw, content):
        for index, line in enumerate(itertools.islice(_lines(content), start, None), start):
            if line is None:
                yield Record(index, raw.tell(), None, _TOO_LONG)
            elif not line.isspace():
                try:
                    yield _object_record(index, raw.tell(), parse_json(line))
                except ValueError as error:
                    yield Record(index, raw.tell(), None, f"not valid JSON: {one_line(error)}{hint}")


def _lines(content: io.BufferedReader) -> Iterator[bytes | None]:
    """The lines; None in the place of one that is too long."""
    while line := content.readline(MAX_RECORD_BYTES):
        if len(line) < MAX_RECORD_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = content.readline(_READ_BYTES)
        yield None


def _object_record(index: int, position: int, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(index, position, value, None)
    problem = f"not a JSON object but {type(value).__name__}; a record looks like {{'text': '...'}}"
    return Record(index, position, None, problem)


def _is_array(path: Path) -> bool:
    """Whether a .json file holds arrays; otherwise it holds one object a line."""
    with _opened(path) as (_, content):
        return content.read(_READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array_records(path: Path, start: int) -> Iterator[Record]:
    """The elements of all arrays; two stand in a file where somebody joined files."""
    index = 0
    with _opened(path) as (raw, content), io.TextIOWrapper(content, encoding="utf-8-sig") as file:
        text = _JsonText(file)
        try:
            while text.peek():
                if not text.take("["):
                    raise ValueError("further text after the array, where only another array is read")
                if text.take("]"):
                    continue
                while True:
                    value = text.value()
                    if index >= start:
                        yield _object_record(index, raw.tell(), value)
                    if not text.take(","):
                        break
                    index += 1
                if not text.take("]"):
                    raise ValueError("',' or ']' expected")
                index += 1
        except ValueError as error:
            place = f"{record_place(path, index)} (line {text.line()})"
            reason = getattr(error, "msg", None) or one_line(error)
            raise InputError(f"{place}: not valid JSON, or truncated: {reason}") from error


class _JsonText:
    """A JSON text read piece by piece, held from the current value on."""

    def __init__(self, file: io.TextIOBase):
        self._file, self._text, self._at, self._lines_before = file, "", 0, 1

    def line(self) -> int:
        return self._lines_before + self._text.count("\n", 0, self._at)

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Passes over the next character that is no space, if it is this one."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = next_json(self._text, self._at)
            except json.JSONDecodeError:  # the rest of it may not have been read yet
                if len(self._text) - self._at >= MAX_RECORD_BYTES:
                    raise ValueError(_TOO_LONG) from None
                if not self._read():
                    raise
            else:
                length = end - self._at
                if end < len(self._text) or not self._read():  # of a number more digits may follow
                    self._at += length
                    return value

    def _read(self) -> bool:
        more = self._file.read(max(_READ_BYTES, len(self._text) - self._at))
        self._lines_before = self.line()
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)


def _parquet_records(path: Path, columns: Sequence[str], start: int, optional: Sequence[str]) -> Iterator[Record]:
    import pyarrow.parquet as pq

    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise InputError(f"{shown(path)}: no column {column!r}; it has {', '.join(names)}")
        wanted = [*columns, *(column for column in optional if column in names)]
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        group_ends = list(itertools.accumulate(group.num_rows for group in groups))
        first_group = bisect.bisect_right(group_ends, start)
        index = group_ends[first_group - 1] if first_group else 0
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        rows = max(1, min(_PARQUET_ROWS, _PARQUET_BYTES // max(row_bytes, 1)))
        for batch in file.iter_batches(rows, row_groups=list(range(first_group, len(groups))), columns=wanted):
            skipped = min(max(start - index, 0), batch.num_rows)
            for row, fields in enumerate(batch.slice(skipped).to_pylist(), index + skipped):
                yield Record(row, size * (row + 1) // file.metadata.num_rows, fields, None, filled=True)
            index += batch.num_rows


def _text_record(path: Path, text_field: str) -> Record:
    with _opened(path) as (raw, file):
        content, position = file.read(MAX_RECORD_BYTES), raw.tell()
    if len(content) == MAX_RECORD_BYTES:
        return Record(0, position, None, _TOO_LONG)
    try:
        return Record(0, position, {text_field: content.decode()}, None)
    except UnicodeDecodeError as error:
        return Record(0, position, None, f"not valid UTF-8: {error.reason} at byte {error.start}")
