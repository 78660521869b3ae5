"""What tells a damaged checkpoint from a sound one: the size and a hash of each of its files, written with it.

They are read whole to compare, a few gigabytes a second, which the restore that follows finds in memory. Checkpoints of
earlier versions have no such file.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from dataflex_jax.errors import InputError
from dataflex_jax.files import digest, replace_json
from dataflex_jax.foreign import read_object
from dataflex_jax.json_lines import Written

FILE = "checksums.json"
# Orbax writes it again as it completes the checkpoint; it holds no number of the run's.
_LATER = "_CHECKPOINT_METADATA"
_BLOCK = 1 << 22


def write(folder: Path, lines: Mapping[str, Written]) -> None:
    """Writes the checksums of all that is in a checkpoint's folder.

    Args:
        folder: of one step, complete but for the last move.
        lines: how far the run folder's files of lines had come, by name.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _LATER)
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = list(pool.map(_hash, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    content = {
        "files": {name: [path.stat().st_size, found] for name, path, found in zip(names, paths, hashes, strict=True)},
        "lines": {name: list(written) for name, written in lines.items()},
    }
    replace_json(folder / FILE, {**content, "digest": digest(content)})


def lines(folder: Path) -> dict[str, Written]:
    """What `write` was given as `lines`, of a sound checkpoint; empty where it has no checksums."""
    if not (folder / FILE).exists():
        return {}
    return {name: Written(*written) for name, written in read_object(folder / FILE)["lines"].items()}


def fault(folder: Path) -> str | None:
    """Which file of a checkpoint is not what was written, and why; None: all are, or it has no checksums.

    Several processes share the work and find the same; all of them must ask.
    """
    if not (folder / FILE).exists():
        return None
    try:
        content = read_object(folder / FILE)
    except InputError as error:
        return str(error).removeprefix(f"{folder}/")
    if content.pop("digest", None) != digest(content):
        return f"{FILE}: not what was written"
    files = list(content["files"].items())
    mine = range(jax.process_index(), len(files), jax.process_count())
    with ThreadPoolExecutor(_threads()) as pool:
        faults = dict(zip(mine, pool.map(lambda i: _file_fault(folder, *files[i]), mine), strict=True))
    first = _first(min((i for i, found in faults.items() if found), default=len(files)))
    if first == len(files):
        return None
    name, (size, _) = files[first]
    return f"{name}: {faults.get(first) or _file_fault(folder, name, (size, None))}"


def _file_fault(folder: Path, name: str, expected: tuple[int, Any]) -> str | None:
    size, written = expected
    try:
        found = (folder / name).stat().st_size
        if found != size:
            return f"{found} bytes where {size} were written"
        return None if _hash(folder / name) == written else "not what was written"
    except OSError as error:
        return error.strerror


def _first(mine: int) -> int:
    """The smallest of all processes' numbers."""
    if jax.process_count() == 1:
        return mine
    return int(multihost_utils.process_allgather(np.int32(mine)).min())


def _hash(path: Path) -> str:
    found, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    return found.hexdigest()


def _threads() -> int:
    return min(16, os.cpu_count() or 1)
