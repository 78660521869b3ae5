"""The token losses of a domain's rows under a reference model: computed once, kept on disk, memory-mapped.

    FOLDER/  losses.uint16 scales.float32 progress.json

Losses are 16-bit integers with a scale for each row, so their error is below 1e-5 of the row's greatest.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dataflex_jax.data.stores.row_results import RowResults
from dataflex_jax.errors import InputError

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
        self._offsets = np.cumsum([0, *lengths], dtype=np.int64)
        offsets = {_LOSSES: 2 * self._offsets, _SCALES: 4 * np.arange(len(self._offsets))}
        self._results = RowResults(folder, offsets, "reference losses")

    def complete(self, compute: Callable[[int, int], Float[np.ndarray, "n T"]], verify: str) -> None:
        """Sees to it that all losses are there; see `RowResults.complete`.

        Args:
            compute: makes the token losses of the rows from the first argument up to the second.
            verify: how closely what is there is looked at; see `checksums.fault`. What is damaged is computed again.

        Raises:
            InputError: losses that are not finite, or a folder that cannot be written and lacks some.
            TrainingError: no space left; what was computed is kept.
        """
        self._results.complete(lambda first, stop: self._encoded(first, compute(first, stop)), _CHUNK, verify)

    def row(self, i: int) -> Float[np.ndarray, " n"]:
        """The token losses of row `i` in nats, float32."""
        levels = self._levels[self._offsets[i] : self._offsets[i + 1]].astype(np.float32)
        return levels * (self._scales[i] / _LEVELS)

    @functools.cached_property
    def _levels(self) -> np.ndarray:
        return self._results.mapped(_LOSSES, np.uint16, (int(self._offsets[-1]),))

    @functools.cached_property
    def _scales(self) -> np.ndarray:
        return self._results.mapped(_SCALES, np.float32, (len(self._offsets) - 1,))

    def _encoded(self, first: int, losses: np.ndarray) -> dict[str, bytes]:
        levels, scales = [], []
        for i, row in enumerate(losses, start=first):
            row = row[: self._offsets[i + 1] - self._offsets[i]]
            if not np.isfinite(row).all():
                raise InputError(f"reference: its losses of row {i} are not finite ({self._results.folder})")
            scale = max(float(row.max()), 1e-30)
            scales.append(np.float32(scale))
            levels.append(np.rint(row / scale * _LEVELS).astype(np.uint16))
        return {_LOSSES: np.concatenate(levels).tobytes(), _SCALES: np.array(scales).tobytes()}
