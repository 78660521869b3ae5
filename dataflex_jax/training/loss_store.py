"""The token losses of a domain's rows under a reference model: computed once, kept on disk, memory-mapped.

    FOLDER/  losses.uint16 scales.float32 progress.json

Losses are 16-bit integers with a scale for each row, so their error is below 1e-5 of the row's greatest.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from dataflex_jax.data.stores.flat_files import Committed, FlatFiles
from dataflex_jax.data.stores.lock import CacheLock, cache_lock
from dataflex_jax.errors import InputError
from dataflex_jax.files import read_sealed, replace_sealed

logger = logging.getLogger(__name__)

_LEVELS = 2**16 - 1
_CHUNK = 4096  # rows between two marks of progress
_LOSSES, _SCALES = "losses.uint16", "scales.float32"


class LossStore:
    """The token losses of one domain's rows.

    Args:
        folder: where the files are, or are to be.
        lengths: inputs of each row.
    """

    def __init__(self, folder: Path, lengths: np.ndarray):
        self._progress = folder / "progress.json"
        self._paths = {name: folder / name for name in (_LOSSES, _SCALES)}
        self._rows = len(lengths)
        self._offsets = np.cumsum([0, *lengths], dtype=np.int64)

    def complete(self, compute: Callable[[int, int], Float[np.ndarray, "n T"]], verify: str) -> None:
        """Sees to it that all losses are there; a later call goes on where this one was interrupted.

        All processes call it together; the first one reads and writes the files.

        Args:
            compute: makes the token losses of the rows from the first argument up to the second.
            verify: how closely what is there is looked at; see `checksums.fault`. What is damaged is computed again.

        Raises:
            InputError: losses that are not finite, or a folder that cannot be written and lacks some.
            TrainingError: no space left; what was computed is kept.
        """
        folder = self._progress.parent
        is_first = jax.process_index() == 0
        with cache_lock(folder, "the store of reference losses") as lock:
            done, kept = self._kept(lock, verify) if is_first else (0, None)
            done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
            files = FlatFiles(self._paths, kept) if is_first and done < self._rows else None
            try:
                for first in range(done, self._rows, _CHUNK):
                    losses = compute(first, min(first + _CHUNK, self._rows))
                    self._check(first, losses)
                    if files:
                        self._append(files, first, losses)
            finally:
                if files:
                    files.close()
        multihost_utils.sync_global_devices(f"{folder} is complete")

    def row(self, i: int) -> Float[np.ndarray, " n"]:
        """The token losses of row `i` in nats, float32."""
        levels = self._levels[self._offsets[i] : self._offsets[i + 1]].astype(np.float32)
        return levels * (self._scales[i] / _LEVELS)

    @functools.cached_property
    def _levels(self) -> np.ndarray:
        return np.memmap(self._paths[_LOSSES], np.uint16, "r", shape=(int(self._offsets[-1]),))

    @functools.cached_property
    def _scales(self) -> np.ndarray:
        return np.memmap(self._paths[_SCALES], np.float32, "r", shape=(self._rows,))

    def _kept(self, lock: CacheLock, verify: str) -> tuple[int, Committed]:
        """(rows that are done, what of the files is theirs); the lock is taken where that is not all of them."""
        problem = None
        try:
            done, committed = self._read(verify)
        except InputError as error:
            done, committed, problem = 0, Committed(), error
        if done < self._rows and lock.take(str(problem or "losses are missing")):
            return self._kept(lock, verify)  # another process may have computed them
        if problem:
            logger.warning("%s; the reference's losses are computed again", problem)
        return done, committed

    def _read(self, verify: str) -> tuple[int, Committed]:
        if not self._progress.exists():
            return 0, Committed()
        saved = read_sealed(self._progress)
        rows = saved.get("rows") if isinstance(saved, dict) else None
        if type(rows) is not int or not 0 <= rows <= self._rows:
            raise InputError(f"{self._progress}: not the progress of a store of {self._rows} rows")
        sizes = {_LOSSES: int(self._offsets[rows]) * 2, _SCALES: rows * 4}
        return rows, Committed.found(self._progress, self._paths, sizes, saved.get("checksums"), verify)

    def _check(self, first: int, losses: np.ndarray) -> None:
        for i, row in enumerate(losses, start=first):
            if not np.isfinite(row[: self._offsets[i + 1] - self._offsets[i]]).all():
                raise InputError(f"reference: its losses of row {i} are not finite ({self._progress.parent})")

    def _append(self, files: FlatFiles, first: int, losses: np.ndarray) -> None:
        for i, row in enumerate(losses, start=first):
            row = row[: self._offsets[i + 1] - self._offsets[i]]
            scale = max(float(row.max()), 1e-30)
            files.append(_SCALES, np.float32(scale).tobytes())
            files.append(_LOSSES, np.rint(row / scale * _LEVELS).astype(np.uint16).tobytes())
        committed = files.commit()
        replace_sealed(self._progress, {"rows": first + len(losses), "checksums": committed.checksums})
