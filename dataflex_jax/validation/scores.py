"""Files of scores: one number a candidate, or one for each candidate and target group."""

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import read_bytes

ACCEPTED = "an .npz of `select`, an .npy [N] or [N, groups], or a .csv"
_ID = "id"
_LARGEST = 1 << 34  # bytes


class Candidates(NamedTuple):
    """What scores are of.

    Attributes:
        num_rows: N, how many.
        groups: names of the target groups.
    """

    num_rows: int
    groups: tuple[str, ...]


def read_scores(path: Path, candidates: Candidates) -> Float64[np.ndarray, "N G"]:
    """The score of each candidate for each target group; one number a candidate counts for all groups.

    A .csv has a column for each group, by name, or one column with any name, or one without; a column `id` says which
    candidate a line is of, from 0, else they come in order. An .npz has `group_scores` [N, groups], or `all_scores`
    [N].

    Raises:
        InputError: a file that cannot be read, scores of other candidates or groups, or that are not finite; in one
            line.
    """
    readers = {".npz": _npz, ".npy": _npy, ".csv": _csv}
    if path.suffix not in readers:
        raise InputError(f"accepted: {ACCEPTED}", option="--scores", value=str(path))
    values = readers[path.suffix](path, candidates)
    if bad := int((~np.isfinite(values)).any(axis=1).sum()):
        raise InputError(
            f"{path}: {bad} of {len(values)} candidates have scores that are not finite; give them a number, such "
            "as the smallest that there is"
        )
    if constant := [name for name, column in zip(candidates.groups, values.T, strict=True) if np.ptp(column) == 0]:
        raise InputError(
            f"{path}: all scores for group {constant[0]!r} are equal; there is nothing to foretell by them"
        )
    return values


def _npz(path: Path, candidates: Candidates) -> Float64[np.ndarray, "N G"]:
    arrays = _loaded(path, "an .npz file of scores")
    if not isinstance(arrays, Mapping):
        raise InputError(f"{path}: one array, not an archive of arrays; {ACCEPTED} is expected")
    name = next((name for name in ("group_scores", "all_scores") if name in arrays), None)
    if name is None:
        raise InputError(
            f"{path}: has {', '.join(arrays) or 'nothing'}, and no all_scores; `select` writes them, and a run with "
            "config.selector.save_all_scores=True"
        )
    try:
        values = arrays[name]
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path}: {name} cannot be read ({one_line(error)})") from error
    values = _checked(f"{path}: {name}", values, candidates)
    if name == "all_scores" or "groups" not in arrays:
        return values
    groups = np.asarray(arrays["groups"]).astype(str).tolist()
    if sorted(groups) != sorted(candidates.groups):
        there = ", ".join(candidates.groups)
        raise InputError(f"{path}: scores for the groups {', '.join(groups)}; the target groups are {there}")
    return values[:, [groups.index(group) for group in candidates.groups]]


def _npy(path: Path, candidates: Candidates) -> Float64[np.ndarray, "N G"]:
    values = _loaded(path, "an .npy file of scores")
    if not isinstance(values, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; one array is expected")
    return _checked(str(path), values, candidates)


def _loaded(path: Path, kind: str) -> np.ndarray | Mapping[str, np.ndarray]:
    contents = read_bytes(path, kind, _LARGEST)
    try:
        return np.load(io.BytesIO(contents), allow_pickle=False)
    except Exception as error:  # the header is a Python literal of somebody else's
        raise InputError(f"{path}: not {kind} ({one_line(error)})") from error


def _checked(what: str, values: np.ndarray, candidates: Candidates) -> Float64[np.ndarray, "N G"]:
    shapes = (candidates.num_rows,), (candidates.num_rows, 1), (candidates.num_rows, len(candidates.groups))
    if values.dtype.kind not in "fiub" or values.shape not in shapes:
        raise InputError(
            f"{what} is {values.dtype} {list(values.shape)}; the pool has {candidates.num_rows} candidates and "
            f"{len(candidates.groups)} target groups: [{candidates.num_rows}] or "
            f"[{candidates.num_rows}, {len(candidates.groups)}] numbers of the same data and tokenizer are expected"
        )
    wanted = candidates.num_rows, len(candidates.groups)
    return np.broadcast_to(values.reshape(wanted[0], -1).astype(np.float64), wanted)


def _csv(path: Path, candidates: Candidates) -> Float64[np.ndarray, "N G"]:
    try:
        text = read_bytes(path, "a .csv file of scores", _LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from error
    lines = [(number, line) for number, line in enumerate(csv.reader(io.StringIO(text)), start=1) if line]
    if not lines:
        raise InputError(f"{path}: nothing in it; one line a candidate is expected")
    header = [name.strip() for name in lines[0][1]]
    if len(header) == 1 and _number(header[0]) is not None:
        header = [""]
    else:
        lines = lines[1:]
    values = np.empty((len(lines), len(header)))
    for row, (number, line) in enumerate(lines):
        if len(line) != len(header):
            raise InputError(f"{path}:{number}: {len(line)} columns; the header has {len(header)}")
        for column, cell in enumerate(line):
            found = _number(cell)
            if found is None:
                raise InputError(f"{path}:{number}: {cell!r} is not a number")
            values[row, column] = found
    return _in_order(path, header, values, candidates)


def _in_order(
    path: Path, header: Sequence[str], values: Float64[np.ndarray, "N C"], candidates: Candidates
) -> Float64[np.ndarray, "N G"]:
    """The columns of a table by candidate and group."""
    if len(values) != candidates.num_rows:
        raise InputError(f"{path}: {len(values)} lines of scores; the pool has {candidates.num_rows} candidates")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{path}: two columns are called {twice[0]!r}")
    if _ID in header:
        ids = values[:, header.index(_ID)]
        if not np.array_equal(np.sort(ids), np.arange(len(ids))):
            raise InputError(f"{path}: the column {_ID!r} must have each of 0 to {len(ids) - 1} once")
        values = values[np.argsort(ids)]
    columns = {name: values[:, place] for place, name in enumerate(header) if name != _ID}
    if len(columns) == 1 and not set(columns) & set(candidates.groups):
        (column,) = columns.values()
        columns = dict.fromkeys(candidates.groups, column)
    unknown = [name for name in columns if name not in candidates.groups]
    missing = [name for name in candidates.groups if name not in columns]
    for name in (*unknown, *missing):
        what = "is no target group" if name in columns else "is a target group without a column"
        raise InputError(f"{path}: {name!r} {what}; the groups are {', '.join(candidates.groups)}")
    return np.stack([columns[name] for name in candidates.groups], axis=1)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
