"""JSON that others wrote, read within limits: every fault of it is one line that names the file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataflex_jax.errors import InputError, one_line

MAX_BYTES = 1 << 28
MAX_DEPTH = 128
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} values"
_DECODER = json.JSONDecoder()
_POINTER = b"version https://git-lfs.github.com/spec/"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a byte order mark is passed over.

    Raises:
        ValueError: it is not valid JSON, nested deeper than `MAX_DEPTH`, or holds an integer of thousands of digits.
    """
    with _limits_in_words():
        value = json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    opened = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if isinstance(value, dict | list) and sum(map(text.count, opened)) > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    return value


def next_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start` of a longer text, and where it ends.

    Raises:
        ValueError: see `parse_json`; `json.JSONDecodeError` where the text is no JSON or ends too early.
    """
    with _limits_in_words():
        value, end = _DECODER.raw_decode(text, start)
    opened = sum(text.count(bracket, start, end) for bracket in "[{")
    if isinstance(value, dict | list) and opened > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    return value, end


@contextlib.contextmanager
def _limits_in_words() -> Iterator[None]:
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:  # whose own words advise to raise Python's limit of digits
        raise ValueError("an integer with thousands of digits") from error


def read_bytes(path: str | os.PathLike[str], kind: str = "a file", limit: int = MAX_BYTES) -> bytes:
    """The contents of a file that is read whole.

    Args:
        path: the file.
        kind: what is expected there, for messages: "a JSON file".
        limit: of its size.

    Raises:
        InputError: there is none, it is no regular file, a Git LFS pointer in its place, or larger than `limit`.
    """
    path = Path(path)
    try:
        # Opening a FIFO would wait for a writer for ever.
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file; {kind} is expected")
        with open(path, "rb") as file:
            # `read` makes room for as much as it is asked for.
            contents = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {kind} is expected") from error
    if len(contents) > limit:
        raise InputError(f"{path}: larger than {limit >> 20} MiB; {kind} is expected")
    if contents.startswith(_POINTER):
        raise _pointer(path)
    return contents


def read_json(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: it cannot be read (see `read_bytes`) or is no JSON (see `parse_json`); names the file.
    """
    return _parsed(path, read_bytes(path, "a JSON file", limit))


def read_object(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it cannot be read (see `read_bytes`), see `object_in`.
    """
    return object_in(path, read_bytes(path, "a JSON file", limit))


def object_in(path: str | os.PathLike[str], contents: bytes) -> dict[str, Any]:
    """The object in the contents of a JSON file.

    Raises:
        InputError: it is no JSON (see `parse_json`), or something else; names the file.
    """
    value = _parsed(path, contents)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}; one object is expected")
    return value


def refuse_pointer(path: str | os.PathLike[str]) -> None:
    """Refuses what `git clone` without Git LFS leaves in a large file's place.

    Raises:
        InputError: the file is such a pointer.
    """
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise _pointer(Path(path))


def _parsed(path: str | os.PathLike[str], contents: bytes) -> Any:
    try:
        return parse_json(contents)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)})") from error


def _pointer(path: Path) -> InputError:
    return InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _is_deeper(value: dict | list, limit: int) -> bool:
    containers = [value]
    for _ in range(limit):
        containers = [
            item
            for held in containers
            for item in (held.values() if isinstance(held, dict) else held)
            if isinstance(item, dict | list)
        ]
        if not containers:
            return False
    return True
