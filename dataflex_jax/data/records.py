"""Readers of data files: one record at a time whatever the format, never a whole file in memory.

JSONL (plain, gzip or Zstandard: one record a line), Parquet (one a row) and plain text (the whole file is one record).
Faults of a file (missing, truncated, corrupt) raise `InputError`; faults of one record are handed on in
`Record.problem`, because `data.on_bad_record` says whether they stop the run.
"""

import bisect
import contextlib
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataflex_jax.errors import InputError

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1024


class Record(NamedTuple):
    """One line, row or file. `fields` is None exactly when `problem` says why."""

    index: int  # from 0, blank lines included
    position: int  # bytes of the file read so far (of the compressed file, if it is)
    fields: Mapping[str, Any] | None
    problem: str | None


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error on one line, shortened to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def split_format(name: str) -> tuple[str, str] | None:
    """`"a.valid.jsonl.gz"` -> `("a.valid", ".jsonl.gz")`; None for a hidden file or one of another format."""
    if name.startswith((".", "_")):
        return None
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], suffix
    return None


def record_place(path: Path, index: int) -> str:
    """Where record `index` lies, for messages: `path:line`, `path: row N` or the path of a text file."""
    if path.name.endswith(".parquet"):
        return f"{path}: row {index}"
    return str(path) if path.name.endswith(".txt") else f"{path}:{index + 1}"


def read_records(path: Path, columns: Sequence[str], start: int = 0) -> Iterator[Record]:
    """Records of one file from record `start` on, in order.

    Args:
        path: a file whose name ends in one of `FORMATS`.
        columns: the top-level fields wanted. A Parquet file must have them and only they are read; the first one is the
            field in which a text file's content is handed back.
        start: records to pass over; they are not parsed.

    Raises:
        InputError: the file is missing, empty, unreadable, truncated or corrupt, or a Parquet file lacks a column.
    """
    with _faults_named(path):
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; delete it or replace it with a complete one")
        if path.name.endswith(".parquet"):
            yield from _parquet_records(path, columns, start)
        elif path.name.endswith(".txt"):
            if start == 0:
                yield _text_record(path, columns[0])
        else:
            yield from _json_records(path, start)


@contextlib.contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
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
            fields, problem = _parse_object(line)
            yield Record(index, raw.tell(), fields, problem)


def _parse_object(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON: {one_line(error)}"
    if not isinstance(fields, dict):
        return None, f"not a JSON object but {type(fields).__name__}; a record looks like {{'text': '...'}}"
    return fields, None


def _parquet_records(path: Path, columns: Sequence[str], start: int) -> Iterator[Record]:
    import pyarrow.parquet as pq

    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise InputError(f"{path}: no column {column!r}; it has {', '.join(names)}")
        group_ends = list(itertools.accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)))
        first_group = bisect.bisect_right(group_ends, start)
        index = group_ends[first_group - 1] if first_group else 0
        groups = list(range(first_group, len(group_ends)))
        for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=list(columns)):
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
