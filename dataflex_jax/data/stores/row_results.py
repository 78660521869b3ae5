"""What a pass over rows has found of each, computed once in chunks, kept on disk and memory-mapped.

    FOLDER/  NAME ... progress.json

Killed at any moment, the same pass goes on after the last chunk that was finished, and ends with the same bytes.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from dataflex_jax.data.stores.flat_files import Committed, FlatFiles
from dataflex_jax.data.stores.lock import CacheLock, cache_lock
from dataflex_jax.errors import InputError
from dataflex_jax.files import read_sealed, replace_sealed

logger = logging.getLogger(__name__)


class RowResults:
    """The results of some rows, in one or several files.

    Args:
        folder: where the files are, or are to be.
        offsets: by file, the byte at which each row's part begins, and behind them the size of the file.
        what: the results, for messages: "reference losses".
    """

    def __init__(self, folder: Path, offsets: Mapping[str, Int64[np.ndarray, " rows+1"]], what: str):
        self.folder, self._offsets, self._what = folder, offsets, what
        self._progress = folder / "progress.json"
        self._paths = {name: folder / name for name in offsets}
        self._rows = len(next(iter(offsets.values()))) - 1

    def complete(self, compute: Callable[[int, int], Mapping[str, bytes]], chunk: int, verify: str) -> None:
        """Sees to it that all results are there; a later call goes on where this one was interrupted.

        All processes call it together; the first one reads and writes the files.

        Args:
            compute: makes each file's part of the rows from the first argument up to the second.
            chunk: rows that are computed between two marks of progress.
            verify: how closely what is there is looked at; see `checksums.fault`. What is damaged is computed again.

        Raises:
            InputError: a folder that cannot be written and lacks some.
            TrainingError: no space left; what was computed is kept.
        """
        is_first = jax.process_index() == 0
        with cache_lock(self.folder, f"the store of {self._what}") as lock:
            done, kept = self._kept(lock, verify) if is_first else (0, None)
            done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
            files = FlatFiles(self._paths, kept) if is_first and done < self._rows else None
            try:
                for first in range(done, self._rows, chunk):
                    stop = min(first + chunk, self._rows)
                    parts = compute(first, stop)
                    if files:
                        for name, data in parts.items():
                            files.append(name, data)
                        replace_sealed(self._progress, {"rows": stop, "checksums": files.commit().checksums})
            finally:
                if files:
                    files.close()
        multihost_utils.sync_global_devices(f"{self.folder} is complete")

    def mapped(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """One of the files as an array, once all is there."""
        return np.memmap(self._paths[name], dtype, "r", shape=shape)

    def _kept(self, lock: CacheLock, verify: str) -> tuple[int, Committed]:
        """(rows that are done, what of the files is theirs); the lock is taken where that is not all of them."""
        problem = None
        try:
            done, committed = self._read(verify)
        except InputError as error:
            done, committed, problem = 0, Committed(), error
        if done < self._rows and lock.take(str(problem or f"{self._what} are missing")):
            return self._kept(lock, verify)  # another process may have computed them
        if problem:
            logger.warning("%s; the %s are computed again", problem, self._what)
        return done, committed

    def _read(self, verify: str) -> tuple[int, Committed]:
        if not self._progress.exists():
            return 0, Committed()
        saved = read_sealed(self._progress)
        rows = saved.get("rows") if isinstance(saved, dict) else None
        if type(rows) is not int or not 0 <= rows <= self._rows:
            raise InputError(f"{self._progress}: not the progress of a store of {self._rows} rows")
        sizes = {name: int(offsets[rows]) for name, offsets in self._offsets.items()}
        return rows, Committed.found(self._progress, self._paths, sizes, saved.get("checksums"), verify)
