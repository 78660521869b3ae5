"""The lock of a cache folder, which only who adds to it takes, and the faults of its disk in one line."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from dataflex_jax.errors import InputError, TrainingError, is_disk_full

logger = logging.getLogger(__name__)


class CacheLock:
    """The lock of a folder; whoever finds all there that it needs never takes it, and may read from a read-only disk.

    Args:
        folder: made when the lock is taken.
        what: is built in it, for messages: "the rows store".
    """

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what
        self._file = folder / ".lock"
        self._lock = filelock.FileLock(str(self._file))

    @property
    def can_be_taken(self) -> bool:
        """Whether the folder, or the one where it is to be made, can be written."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        is_ours = not self._file.exists() or os.access(self._file, os.W_OK)
        return there.is_dir() and os.access(there, os.W_OK) and is_ours

    def take(self, why: str) -> bool:
        """Waits for the lock and holds it from now on.

        Args:
            why: what is missing, for messages.

        Returns:
            Whether it was not held before: another process may have made what was missing.

        Raises:
            InputError: the folder cannot be written.
        """
        if self._lock.is_locked:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that builds %s in %s", self.what, self.folder)
            self._lock.acquire()
        except OSError as error:
            if is_disk_full(error):
                raise
            reason = f"{self.folder} is not a writable folder: {error.strerror} ({why})"
            raise InputError(reason, option="data.cache_dir") from error
        self._look_again()
        return True

    def _look_again(self) -> None:
        # A network file system remembers for a while what was not there, until the folder is read.
        for folder in (self.folder, *filter(Path.is_dir, self.folder.iterdir())):
            os.listdir(folder)

    def release(self) -> None:
        """Lets others in."""
        self._lock.release()


@contextlib.contextmanager
def cache_lock(folder: Path, what: str) -> Iterator[CacheLock]:
    """A folder's lock, not taken yet, and in one line what goes wrong with its disk.

    Args:
        folder: of a cache.
        what: is built in it, for messages: "the rows store".

    Raises:
        TrainingError: no space left.
        InputError: something in the folder cannot be read or written.
    """
    lock = CacheLock(folder, what)
    try:
        yield lock
    except OSError as error:
        if is_disk_full(error):
            raise TrainingError(
                f"{folder}: no space left while building {what}; what is committed is safe, free some space (or set "
                "data.cache_dir elsewhere) and run the same command again"
            ) from error
        if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise
        reason = f"{error.filename} cannot be used: {error.strerror}"
        raise InputError(reason, option="data.cache_dir") from error
    finally:
        lock.release()
