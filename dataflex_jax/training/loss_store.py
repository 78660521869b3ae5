"""The token losses of a domain's rows under a reference model, memory-mapped and resumable.

Losses are 16-bit integers with a scale for each row, so their error is below 1e-5 of the row's greatest.
"""

import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_file

_LEVELS = 2**16 - 1
_CHUNK = 4096  # rows between two marks of progress


class LossStore:
    """The token losses of one domain's rows, memory-mapped.

    Args:
        folder: where the files are; made where it is missing.
        lengths: inputs of each row.
    """

    def __init__(self, folder: Path, lengths: np.ndarray):
        self._progress = folder / "progress.json"
        self._rows = len(lengths)
        self._offsets = np.cumsum([0, *lengths], dtype=np.int64)
        files = (
            (folder / "losses.uint16", np.uint16, int(self._offsets[-1])),
            (folder / "scales.float32", np.float32, self._rows),
        )
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path, dtype, size in files:
                if not path.exists():
                    np.memmap(path, dtype, "w+", shape=(size,)).flush()
        multihost_utils.sync_global_devices(f"{folder} is there")
        mode = "r" if self._done() == self._rows or jax.process_index() > 0 else "r+"
        self._levels, self._scales = (np.memmap(path, dtype, mode, shape=(size,)) for path, dtype, size in files)

    def missing(self):
        """(first, end) of the parts that are still to be written, in order."""
        for first in range(self._done(), self._rows, _CHUNK):
            yield first, min(first + _CHUNK, self._rows)

    def write(self, first: int, losses: Float[np.ndarray, "n T"]) -> None:
        """Writes the losses of the rows from `first` on, and marks them as done."""
        if jax.process_index() == 0:
            for i, row in enumerate(losses, start=first):
                row = row[: self._offsets[i + 1] - self._offsets[i]]
                if not np.isfinite(row).all():
                    raise InputError(f"reference: its losses of row {i} are not finite ({self._progress.parent})")
                self._scales[i] = scale = max(float(row.max()), 1e-30)
                self._levels[self._offsets[i] : self._offsets[i + 1]] = np.rint(row / scale * _LEVELS)
            self._levels.flush()
            self._scales.flush()
            replace_file(self._progress, json.dumps({"rows": first + len(losses)}).encode())

    def row(self, i: int) -> Float[np.ndarray, " n"]:
        """The token losses of row `i` in nats, float32."""
        levels = self._levels[self._offsets[i] : self._offsets[i + 1]].astype(np.float32)
        return levels * (self._scales[i] / _LEVELS)

    def _done(self) -> int:
        return json.loads(self._progress.read_text())["rows"] if self._progress.exists() else 0
