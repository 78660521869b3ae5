"""The scores that an order goes by."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
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
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"candidate {number} has {value!r}, not a number", **option)
    return np.array(values, np.float32)


def _file(path: Path, num_rows: int) -> Float[np.ndarray, " N"]:
    if not path.is_file():
        raise InputError(f"no such file; accepted: {_ACCEPTED}", option="order.scores", value=str(path))
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{path}: not an .npy file of numbers ({error})") from error
    elif path.suffix == ".jsonl":
        values = np.array([_score(path, i, record) for i, record in enumerate(_records(path), start=1)])
    else:
        raise InputError(f"accepted: {_ACCEPTED}", option="order.scores", value=str(path))
    if values.shape != (num_rows,) or values.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: {values.dtype} {list(values.shape)}; one number for each of {num_rows} candidates is expected"
        )
    return values.astype(np.float32)


def _records(path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            reason = f"not valid JSON ({error}); one score a line is expected"
            raise InputError(f"{path}:{number}: {reason}") from error
    return records


def _score(path: Path, number: int, record: Any) -> float:
    value = record.get("score") if isinstance(record, dict) else record
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}:{number}: a number, or an object with a number `score`, is expected")
    return float(value)
