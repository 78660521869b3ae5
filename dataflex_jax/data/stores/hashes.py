"""Digests of whole files."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tqdm

from dataflex_jax.data.stores.lock import CacheLock
from dataflex_jax.errors import InputError
from dataflex_jax.files import read_sealed, replace_sealed

logger = logging.getLogger(__name__)


class FileHashes:
    """Digests of whole files, remembered by path, size and modification time so that a restart only stats.

    Args:
        path: what is remembered.
        lock: of its folder, so that of processes that start at once one hashes; a read-only one is done without.
        again: hash every file, whatever is remembered: an edit may keep size and time.
        progress: show a bar on stderr.
    """

    def __init__(self, path: Path, lock: CacheLock, *, again: bool, progress: bool):
        self._path, self._lock, self._again, self._progress = path, lock, again, progress
        self._known, self._learnt = self._remembered(), {}
        if path.is_file() and not self._known:
            logger.warning("%s: damaged; the files are hashed again", path)

    def __call__(self, file: Path) -> str:
        """The digest of a file. Raises `InputError` where it cannot be read."""
        with _faults_named(file):
            status, name = file.stat(), str(file.resolve())
        stamp = [status.st_size, status.st_mtime_ns]
        if not self._again:
            if not self._knows(name, stamp) and self._lock.can_be_taken and self._lock.take(f"{file} is new"):
                self._known = self._remembered()
            if self._knows(name, stamp):
                return self._known[name][2]
        with _faults_named(file):
            content = self._hashed(file, status.st_size)
        if self._known.get(name) != [*stamp, content]:
            self._known[name] = self._learnt[name] = [*stamp, content]
        return content

    def save(self) -> None:
        """Writes what was learnt, for the next start; not where the folder is read-only."""
        if self._learnt and self._lock.can_be_taken:
            self._lock.take("files are new")
            replace_sealed(self._path, self._remembered() | self._learnt)

    def _remembered(self) -> dict[str, Any]:
        """What is remembered; nothing where it is damaged."""
        try:
            known = read_sealed(self._path)
        except InputError:
            return {}
        return known if isinstance(known, dict) else {}

    def _knows(self, name: str, stamp: list[int]) -> bool:
        match self._known.get(name):
            case [size, time, str()]:
                return [size, time] == stamp
        return False

    def _hashed(self, file: Path, size: int) -> str:
        content = hashlib.blake2b(digest_size=16)
        with (
            open(file, "rb", buffering=0) as raw,
            progress_bar(size, f"hashing {file.name}", self._progress) as bar,
        ):
            while block := raw.read(1 << 22):
                content.update(block)
                bar.update(len(block))
        return content.hexdigest()


@contextlib.contextmanager
def _faults_named(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def progress_bar(total: int, description: str, progress: bool) -> tqdm.tqdm:
    """A bar in bytes with rate and remaining time; work of under half a second shows none."""
    return tqdm.tqdm(
        total=total, desc=description, unit="B", unit_scale=True, disable=not progress, delay=0.5, leave=False
    )
