"""The scores that an order goes by."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from dataflex_jax.data.pool import Pool
from dataflex_jax.data.vectors import mapped
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import parse_json, read_bytes
from dataflex_jax.policies.base import ScoreSource
from dataflex_jax.policies.signals import Losses, Signals

_ACCEPTED = '"loss", "selector", "field:NAME", or a .npy or .jsonl file with one score a candidate'


def order_scores(
    source: ScoreSource, pool: Pool, signals: Signals, ids: Int64[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    """The scores of some candidates, float32.

    Args:
        source: an order's, other than "selector"; zeros of "none".
        pool: the candidates.
        signals: of the current model.
        ids: places in the pool; None: all.

    Raises:
        InputError: a field or file that does not give one number a candidate.
    """
    if source.kind == "none":
        return np.zeros(pool.num_rows if ids is None else len(ids), np.float32)
    if source.kind == "loss":
        return signals.candidates.sweep(Losses(), ids)
    values = _field(source, pool) if source.kind == "field" else _file(Path(source.name), pool.num_rows)
    return values if ids is None else values[ids]


def _field(source: ScoreSource, pool: Pool) -> Float[np.ndarray, " N"]:
    option = {"option": "order.scores", "value": str(source)}
    if pool.records() is None:
        raise InputError("rows of documents are no records; instruction data are", **option)
    try:
        values = [value for domain in pool.domains for value in domain.store.values("train", source.name)]
    except InputError as error:
        raise InputError(error, **option) from error
    for number, value in enumerate(values):
        if not _is_number(value):
            raise InputError(f"candidate {number} has {value!r}, not a number", **option)
    return np.array(list(map(float, values)), np.float32)


def _file(path: Path, num_rows: int) -> Float[np.ndarray, " N"]:
    if not path.is_file():
        raise InputError(f"no such file; accepted: {_ACCEPTED}", option="order.scores", value=str(path))
    if path.suffix == ".npy":
        values = mapped(path)
    elif path.suffix == ".jsonl":
        values = np.array([_score(path, i, line) for i, line in enumerate(_lines(path), start=1)])
    else:
        raise InputError(f"accepted: {_ACCEPTED}", option="order.scores", value=str(path))
    if values.shape != (num_rows,) or values.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: {values.dtype} {list(values.shape)}; one number for each of {num_rows} candidates is expected"
        )
    if np.isnan(values).any():
        raise InputError(f"{path}: the score of candidate {np.isnan(values).argmax()} is NaN; a number is expected")
    return values.astype(np.float32)


def _lines(path: Path) -> list[str]:
    try:
        return read_bytes(path, "a .jsonl file of scores").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); one score a line is expected") from error


def _score(path: Path, number: int, line: str) -> float:
    try:
        record = parse_json(line)
    except ValueError as error:
        reason = f"not valid JSON ({one_line(error)}); one score a line is expected"
        raise InputError(f"{path}:{number}: {reason}") from error
    value = record.get("score") if isinstance(record, dict) else record
    if not _is_number(value):
        raise InputError(f"{path}:{number}: a number, or an object with a number `score`, is expected")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float holds; JSON's readers take NaN for one too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) if isinstance(value, float) else abs(value) <= sys.float_info.max
