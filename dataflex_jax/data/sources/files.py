"""Readers of data files: one record at a time whatever the format, never a whole file in memory.

JSONL (plain, gzip or Zstandard: one record a line), Parquet (one a row), plain text (the whole file is one record) and,
for instruction data, JSON (an array of records). Faults of a file (missing, truncated, corrupt) raise `InputError`;
faults of one record are handed on in `Record.problem`, because `data.on_bad_record` says whether they stop the run.
"""

import bisect
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataflex_jax.errors import InputError, one_line

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
INSTRUCTION_FORMATS = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_SPACE = re.compile(r"[ \t\n\r]*")
_JSON = json.JSONDecoder()


class Record(NamedTuple):
    """One line, row or file. `fields` is None exactly when `problem` says why."""

    index: int  # from 0, blank lines included
    position: int  # bytes of the file read so far (of the compressed file, if it is)
    fields: Mapping[str, Any] | None
    problem: str | None


def split_format(name: str, formats: Sequence[str] = FORMATS) -> tuple[str, str] | None:
    """`"a.valid.jsonl.gz"` -> `("a.valid", ".jsonl.gz")`; None for a hidden file or one of none of `formats`."""
    if name.startswith((".", "_")):
        return None
    for suffix in sorted(formats, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], suffix
    return None


def check_links(paths: Sequence[Path]) -> None:
    """Refuses links to nothing, which would leave out data without a word.

    Raises:
        InputError: one of `paths`, not hidden, is such a link.
    """
    for path in paths:
        if path.is_symlink() and not path.exists() and not path.name.startswith((".", "_")):
            raise InputError(f"{path}: a link to {path.readlink()}, which does not exist; repair or delete the link")


def record_place(path: Path, index: int) -> str:
    """Where record `index` lies, for messages: `path:line`, `path: row N`, `path: record N`, or a text file's path."""
    if path.name.endswith(".parquet"):
        return f"{path}: row {index}"
    if path.name.endswith(".json"):
        return f"{path}: record {index}"
    return str(path) if path.name.endswith(".txt") else f"{path}:{index + 1}"


def read_records(path: Path, columns: Sequence[str], start: int = 0, optional: Sequence[str] = ()) -> Iterator[Record]:
    """Records of one file from record `start` on, in order.

    Args:
        path: a file whose name ends in one of `FORMATS` or `INSTRUCTION_FORMATS`.
        columns: the top-level fields wanted. A Parquet file must have them and only they are read; the first one is the
            field in which a text file's content is handed back.
        start: records to pass over.
        optional: further fields, read from a Parquet file where it has them.

    Raises:
        InputError: the file is missing, empty, unreadable, truncated or corrupt, or a Parquet file lacks a column.
    """
    with faults_named(path):
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; delete it or replace it with a complete one")
        if path.name.endswith(".parquet"):
            yield from _parquet_records(path, columns, start, optional)
        elif path.name.endswith(".txt"):
            if start == 0:
                yield _text_record(path, columns[0])
        elif path.name.endswith(".json") and _is_array(path):
            yield from _array_records(path, start)
        else:
            yield from _json_records(path, start)


@contextlib.contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Makes an `InputError` that names the file of what goes wrong with reading it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path}: cannot be read, or is truncated or corrupt: {reason}") from error


def _json_records(path: Path, start: int) -> Iterator[Record]:
    with contextlib.ExitStack() as stack:
        if path.name.endswith(".zst"):
            import pyarrow as pa

            # zstandard's own stream reader ends without an error inside a truncated frame; Arrow's raises.
            raw = stack.enter_context(pa.OSFile(str(path)))
            unpacked = stack.enter_context(pa.CompressedInputStream(raw, "zstd"))
        else:
            raw = stack.enter_context(open(path, "rb", buffering=0))
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=raw)) if path.name.endswith(".gz") else raw
        lines = stack.enter_context(io.BufferedReader(unpacked, _READ_BYTES))
        for index, line in enumerate(itertools.islice(lines, start, None), start):
            if line.isspace():
                continue
            try:
                yield _object_record(index, raw.tell(), json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Record(index, raw.tell(), None, f"not valid JSON: {one_line(error)}")


def _object_record(index: int, position: int, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(index, position, value, None)
    problem = f"not a JSON object but {type(value).__name__}; a record looks like {{'text': '...'}}"
    return Record(index, position, None, problem)


def _is_array(path: Path) -> bool:
    """Whether a .json file holds one array; otherwise it holds one object a line."""
    with open(path, encoding="utf-8-sig") as file:
        while (character := file.read(1)).isspace():
            pass
    return character == "["


def _array_records(path: Path, start: int) -> Iterator[Record]:
    index = 0
    with open(path, encoding="utf-8-sig") as file:
        text = _JsonText(file)
        try:
            more = text.take("[") and text.peek() != "]"
            while more:
                value = text.value()
                if index >= start:
                    yield _object_record(index, file.buffer.tell(), value)
                more = text.take(",]") == ","
                index += 1
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", None) or one_line(error)
            place = f"{record_place(path, index)} (line {text.line()})"
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

    def take(self, accepted: str) -> str:
        character = self.peek()
        if not character or character not in accepted:
            raise json.JSONDecodeError(f"{' or '.join(map(repr, accepted))} expected", self._text, self._at)
        self._at += 1
        return character

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self._at = _JSON.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError:  # the rest of it may not have been read yet
                if not self._read():
                    raise

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
                raise InputError(f"{path}: no column {column!r}; it has {', '.join(names)}")
        wanted = [*columns, *(column for column in optional if column in names)]
        group_ends = list(itertools.accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)))
        first_group = bisect.bisect_right(group_ends, start)
        index = group_ends[first_group - 1] if first_group else 0
        groups = list(range(first_group, len(group_ends)))
        for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=wanted):
            skipped = min(max(start - index, 0), batch.num_rows)
            for row, fields in enumerate(batch.slice(skipped).to_pylist(), index + skipped):
                yield Record(row, size * (row + 1) // file.metadata.num_rows, fields, None)
            index += batch.num_rows


def _text_record(path: Path, text_field: str) -> Record:
    content = path.read_bytes()
    try:
        return Record(0, len(content), {text_field: content.decode()}, None)
    except UnicodeDecodeError as error:
        return Record(0, len(content), None, f"not valid UTF-8: {error.reason} at byte {error.start}")
