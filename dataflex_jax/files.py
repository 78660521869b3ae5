"""Files written so that a reader, or a killed process, never finds half of one, and exact, append-only JSON lines.

Everything here runs on the host and takes Python, numpy or JAX values; nothing is traced.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dataflex_jax.errors import InputError, TrainingError, one_line
from dataflex_jax.foreign import parse_json, read_json

# Fields that have no value when a domain had no rows or the hardware's peak is unknown.
NULLABLE = frozenset({"domain_loss", "domain_excess", "excess", "mfu"})
_BLOCK = 1 << 20

# Bytes of a file's name that a domain's takes up: with a key and an ending it stays below 143, all that some allow.
_NAME_BYTES = 80
_ORDINARY_NAME = re.compile(r"(?!\.)[\w.-]+(?<!\.)")
# What Windows keeps for devices, whatever the ending.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def to_jsonable(values: Mapping[str, Any], nullable: Collection[str] = NULLABLE) -> dict[str, Any]:
    """A record as plain Python values: numpy and JAX scalars become numbers, arrays become lists, paths text.

    A NaN or infinity becomes None at and below the fields named in `nullable`.

    Raises:
        TrainingError: a NaN or infinity anywhere else; names the field.
        TypeError: a value with no JSON form.
    """
    return _convert(values, "", frozenset(nullable), False)


def _convert(value: Any, path: str, nullable: frozenset[str], null_ok: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _convert(item, f"{path}.{key}" if path else str(key), nullable, null_ok or key in nullable)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_convert(item, f"{path}[{i}]", nullable, null_ok) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, float):
        array = np.asarray(value)
        # "V" is how numpy sees bfloat16 and the float8 types.
        if array.dtype.kind in "fV":
            array = array.astype(np.float64)
        elif array.dtype.kind not in "iub":
            raise TypeError(f"{path} is a {type(value).__name__}, which has no JSON form")
        if array.ndim or array.dtype.kind != "f":
            return _convert(array.tolist(), path, nullable, null_ok)
        value = float(array)
    if math.isfinite(value):
        return float(value)
    if null_ok:
        return None
    raise TrainingError(f"{path} is {value}; only a finite number can be recorded there")


def to_json(record: Mapping[str, Any], nullable: Collection[str] = NULLABLE, *, indent: int | None = None) -> str:
    """The JSON text of a record, converted and refused as `to_jsonable` does.

    A float is written with the digits of its float64 value, so that a float64, float32 or bfloat16 reads back as the
    same number.
    """
    return json.dumps(to_jsonable(record, nullable), indent=indent, allow_nan=False, ensure_ascii=False)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Gives the file new contents so that a reader, or a run killed half-way, sees the old ones or the new ones.

    Several processes of a host may do so at once; one of them comes last.

    Args:
        path: the file, made with its folder when missing.
        data: its new contents.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_json(path: str | os.PathLike[str], value: Any, **options: Any) -> None:
    """`replace_file` with a value's JSON text and a line end.

    Args:
        path: the file, made with its folder when missing.
        value: what `json.dumps` takes.
        **options: of `json.dumps`.
    """
    replace_file(path, (json.dumps(value, **options) + "\n").encode())


def unwritable(path: str | os.PathLike[str]) -> str | None:
    """Why a file cannot be written, found without writing it, or None; of a folder that is missing, its nearest parent
    decides."""
    path = Path(path)
    if path.is_dir():
        return "it is a folder"
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror}"


def digest(value: Any) -> str:
    """32 hex digits that stand for a JSON value, whatever the order of its objects' fields."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def replace_sealed(path: str | os.PathLike[str], value: Mapping[str, Any], **options: Any) -> None:
    """`replace_json` with an object and its digest, by which `read_sealed` finds what was altered.

    Args:
        path: the file, made with its folder when missing.
        value: what `json.dumps` takes, without a field "digest".
        **options: of `json.dumps`.
    """
    replace_json(path, {**value, "digest": digest(value)}, **options)


def read_sealed(path: str | os.PathLike[str]) -> Any:
    """What `replace_sealed` wrote; any other JSON value, and an object without a digest, is taken as it is.

    Raises:
        InputError: the file cannot be read, is not valid JSON, or was altered.
    """
    value = read_json(path)
    if isinstance(value, dict) and value.pop("digest", digest(value)) != digest(value):
        raise InputError(f"{os.fspath(path)}: altered after it was written")
    return value


def file_name(name: str) -> str:
    """The part of a file's name that stands for `name`, of a domain, say: valid everywhere and below 100 bytes.

    An ordinary name of letters, digits, "_", "-" and "." stands for itself. Others are simplified, with a digest behind
    "~" that tells those apart which would be the same. Names that differ by case alone do so here too, which not every
    file system tells apart.
    """
    simple = re.sub(r"[^\w.-]+", "_", name)
    ordinary = _ORDINARY_NAME.fullmatch(name) and not _DEVICE.match(name)
    if ordinary and len(name.encode()) <= _NAME_BYTES:
        return name
    return simple.encode()[:_NAME_BYTES].decode(errors="ignore").lstrip(".") + "~" + digest(name)[:10]


def keyed_path(folder: Path, name: str, key: str, partial: str = ".partial") -> Path:
    """`folder/NAME-KEY`, or what lies there with this key under another name: the key says what it is.

    Args:
        folder: may be missing.
        name: what people know it by; see `file_name`.
        key: hexadecimal digits.
        partial: ending of what is not finished.
    """
    path = folder / f"{file_name(name)}-{key}"
    if not path.exists():
        for ending in ("", partial):
            for other in sorted(folder.glob(f"*-{key}{ending}")):
                return other.with_name(other.name.removesuffix(ending))
    return path


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


def expanded(path: str | os.PathLike[str]) -> str:
    """A path with `~` and environment variables in the place of which their values stand.

    Raises:
        InputError: a variable that is not set, or a `~name` of nobody here.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    if unknown := re.search(r"\$(\w+|\{[^}]*\})|^~[^/]*", found):
        raise InputError(f"{os.fspath(path)}: {unknown[0]} stands for nothing here; give the path itself")
    return found
