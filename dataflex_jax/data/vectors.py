"""Arrays of numbers in files of the user's own: .npy, and of vectors .parquet too."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dataflex_jax.errors import InputError, one_line

_NUMBERS = "fiu"  # kinds of dtypes
_ROWS_AT_A_TIME = 16384


class Vectors(NamedTuple):
    """The rows of a matrix in a file, which is read in parts.

    Attributes:
        path: of the file.
        num_rows: how many.
        width: numbers of each.
        read: the rows from the first argument up to the second, of any real dtype.
    """

    path: Path
    num_rows: int
    width: int
    read: Callable[[int, int], np.ndarray]

    def check(self) -> None:
        """Reads all rows once.

        Raises:
            InputError: some that are not finite in float32, or zero throughout: how many, and the first.
        """
        faults: dict[str, list[int]] = {"not finite": [], "all zero": []}
        for first in range(0, self.num_rows, _ROWS_AT_A_TIME):
            rows = _float32(self.read(first, min(first + _ROWS_AT_A_TIME, self.num_rows)))
            faults["not finite"] += (first + np.flatnonzero(~np.isfinite(rows).all(axis=1))).tolist()
            faults["all zero"] += (first + np.flatnonzero((rows == 0).all(axis=1))).tolist()
        for what, rows in faults.items():
            if rows:
                count = f"{len(rows)} of {self.num_rows} rows are" if len(rows) > 1 else "a row is"
                raise InputError(f"{self.path}: {count} {what}, first row {rows[0]} (from 0); an embedding is expected")

    def units(self, first: int, stop: int) -> Float[np.ndarray, "n width"]:
        """Some of the rows, float32 and of length 1."""
        rows = self.read(first, stop).astype(np.float64)
        rows /= np.abs(rows).max(axis=1, keepdims=True)  # squares of very large or small numbers have no float
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def open_vectors(path: Path) -> Vectors:
    """The vectors of a .npy or .parquet file; only its header is read.

    Raises:
        InputError: no such file, or none of vectors.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise InputError(f"{path}: must end in .npy or .parquet")
    if not path.is_file():
        raise InputError(f"{path}: no such file; an .npy or .parquet file of vectors is expected")
    if path.suffix == ".parquet":
        from dataflex_jax.data.parquet_vectors import open_parquet  # Arrow takes a while to import

        return Vectors(path, *open_parquet(path))
    values = mapped(path)
    if values.ndim != 2 or values.dtype.kind not in _NUMBERS or values.shape[1] == 0:
        raise InputError(f"{path}: {values.dtype} {list(values.shape)}; numbers [rows, width] are expected")
    return Vectors(path, *values.shape, lambda first, stop: np.asarray(values[first:stop]))


def mapped(path: Path) -> np.ndarray:
    """The array of an .npy file, memory-mapped: a header may claim more numbers than there are, or than fit.

    Raises:
        InputError: it is none, or one of Python's objects.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is a Python literal of somebody else's
        raise InputError(f"{path}: not an .npy file of numbers ({one_line(error)})") from error
    if not isinstance(values, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; one array is expected")
    return values


def _float32(rows: np.ndarray) -> Float[np.ndarray, "n width"]:
    with np.errstate(over="ignore"):
        return rows.astype(np.float32)
