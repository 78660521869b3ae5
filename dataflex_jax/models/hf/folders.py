"""Folders of checkpoints in Hugging Face's format: where they are, and the JSON files in them."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import expanded
from dataflex_jax.foreign import read_object

CONFIG = "config.json"


def local_folder(name_or_path: str, patterns: Sequence[str], option: str) -> Path:
    """The folder of a checkpoint on this machine: `name_or_path` itself, or a download of the hub's files.

    Args:
        name_or_path: a folder or a hub id.
        patterns: the files to download, as in the shell.
        option: what the user set to `name_or_path`, for messages.

    Raises:
        InputError: neither a folder nor an id that the hub or its cache on this machine has.
    """
    path = expanded(name_or_path)
    if os.path.isdir(path):  # pathlib's raises where a name is too long
        return Path(path)
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=list(patterns)))
    except Exception as error:  # the client's own, those of its HTTP library and of the system
        raise InputError(
            f"no such folder, and not to be had from the hub or its cache; a folder with {CONFIG} or a hub id is "
            f"accepted ({one_line(error, 160)})",
            option=option,
            value=name_or_path,
        ) from error


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The contents of a checkpoint's config.json, or of another JSON file there.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    return read_object(folder / name)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the file's name before the fault of what is in it.

    Raises:
        InputError: the fault.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def make_empty(folder: Path) -> None:
    """Makes a folder to write to.

    Raises:
        InputError: it cannot be made, or holds something.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made as a folder ({error.strerror}); choose another") from error
    if held := next(folder.iterdir(), None):
        raise InputError(f"{folder}: holds {held.name!r} already; choose a new or an empty folder")
