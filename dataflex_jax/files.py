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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.foreign import read_json

# Fields that have no value when a domain had no rows or the hardware's peak is unknown.
NULLABLE = frozenset({"domain_loss", "domain_excess", "excess", "mfu"})

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
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # that of a write on a full disk has none
        raise
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


def expanded(path: str | os.PathLike[str]) -> str:
    """A path with `~` and environment variables in the place of which their values stand.

    Raises:
        InputError: a variable that is not set, or a `~name` of nobody here.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    if unknown := re.search(r"\$(\w+|\{[^}]*\})|^~[^/]*", found):
        raise InputError(f"{os.fspath(path)}: {unknown[0]} stands for nothing here; give the path itself")
    return found
