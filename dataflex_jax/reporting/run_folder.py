"""A run folder's final summary, and all that it says read back for plots and the report."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from dataflex_jax.errors import InputError, TrainingError, one_line
from dataflex_jax.files import replace_json, to_jsonable
from dataflex_jax.foreign import read_object
from dataflex_jax.json_lines import parse_object

# What is kept of the lines of one policy or split, at least.
MOST_LINES = 5000
_KIND = re.compile(rb'"(?:policy|split)": ?"([^"]*)"')


class _Kind(NamedTuple):
    """What a field of a line may be.

    Attributes:
        accepts: a value, None where there is none.
        expected: in words.
    """

    accepts: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _is_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


def _are_lists(value: Any) -> bool:
    def is_list(part: Any) -> bool:
        return part is None or (isinstance(part, list) and all(map(_is_number, part)))

    return value is None or (isinstance(value, dict) and all(map(is_list, value.values())))


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_numbers, value.values())))


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):  # no text, or that of no time
        return False


_STEP = _Kind(lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer")
_TEXT = _Kind(lambda value: value is None or isinstance(value, str), "a text")
_NUMBER = _Kind(_is_number, "a number")
_NUMBERS = _Kind(_is_numbers, "an object of numbers by name")
_LISTS = _Kind(_are_lists, "an object of lists of numbers by name")
_TABLE = _Kind(_is_table, "an object of objects of numbers")
_OF_METRICS = {
    **dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second", "mfu"), _NUMBER),
    **dict.fromkeys(("domain_loss", "domain_epochs", "domain_excess"), _NUMBERS),
    "domain_router_load": _LISTS,
}
_OF_POLICY = {
    "policy": _TEXT,
    "observed": _TABLE,
    "sampling_weights": _NUMBERS,
    "domain_share": _NUMBERS,
    **dict.fromkeys(("coverage", "overlap", "score_min", "score_mean", "score_max"), _NUMBER),
}
_OF_TIMES = {"time": _Kind(_is_time, "a time as 2026-01-31T12:00:00+00:00")}
_OF_EVALUATIONS = {"split": _TEXT, "domains": _TABLE, "overall": _NUMBERS}


def write_summary(run_folder: str | os.PathLike[str], values: Mapping[str, Any]) -> Path:
    """Writes `summary.json` in the run folder, replacing an earlier one in one move, and returns its path.

    Raises:
        TrainingError: a NaN or infinity outside `NULLABLE`; names the field.
    """
    path = Path(run_folder) / "summary.json"
    try:
        written = to_jsonable(values)
    except TrainingError as error:
        raise TrainingError(f"{path.name}: {error}") from error
    replace_json(path, written, indent=2, ensure_ascii=False)
    return path


@dataclass(frozen=True)
class RunRecords:
    """What a run folder says of its run; a file that is not there is an empty mapping or list.

    Of a long run's lines it holds evenly spaced ones, as many as a picture can show, so that memory does not grow.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    policy: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    times: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def load(cls, run_folder: str | os.PathLike[str]) -> Self:
        """Reads config.json, metrics.jsonl, policy.jsonl, eval.jsonl, times.jsonl and summary.json.

        Raises:
            InputError: not a run folder, or a file in it is malformed; names the file and line.
        """
        folder = Path(run_folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; a run folder (the --workdir of a training run) is expected")
        if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
            raise InputError(f"{folder}: not a run folder; config.json or metrics.jsonl is expected in it")
        return cls(
            folder=folder,
            config=_read_object(folder / "config.json"),
            metrics=_read_lines(folder / "metrics.jsonl", _OF_METRICS),
            policy=_read_lines(folder / "policy.jsonl", _OF_POLICY),
            evals=_read_lines(folder / "eval.jsonl", _OF_EVALUATIONS),
            times=_read_lines(folder / "times.jsonl", _OF_TIMES),
            summary=_read_object(folder / "summary.json"),
        )


def series(records: Iterable[Mapping[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one number in nested records; records without such a number are left out."""
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            steps.append(record["step"])
            values.append(value)
    return np.array(steps, np.int64), np.array(values, np.float64)


def _read_lines(path: Path, fields: Mapping[str, "_Kind"]) -> list[dict[str, Any]]:
    """The records of a file of lines, `MOST_LINES` to twice as many of each policy or split where there are more."""
    if not path.is_file():
        return []
    try:
        return [_record(path, number, line, fields) for number, line in _thinned(path)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a JSON-lines file is expected") from error


def _thinned(path: Path) -> list[tuple[int, bytes]]:
    """(number, line) of a file's complete lines; of many of a kind, evenly spaced ones with the first and the last."""
    kept, last, counts, strides = {}, {}, Counter(), defaultdict(lambda: 1)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            found = _KIND.search(line)
            kind = found and found[1]
            of_kind = kept.setdefault(kind, [])
            last[kind] = (number, line)
            if counts[kind] % strides[kind] == 0:
                of_kind.append((number, line))
            counts[kind] += 1
            if len(of_kind) > 2 * MOST_LINES:
                del of_kind[1::2]
                strides[kind] *= 2
    return sorted({*last.values(), *(entry for of_kind in kept.values() for entry in of_kind)})


def _record(path: Path, number: int, line: bytes, fields: Mapping[str, "_Kind"]) -> dict[str, Any]:
    try:
        record = parse_object(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: {error}") from error
    for name, kind in {"step": _STEP, **fields}.items():
        if not kind.accepts(record.get(name)):
            value = one_line(repr(record.get(name)), 60)
            raise InputError(f"{path}:{number}: {name} = {value}; {kind.expected} is expected")
    return record


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
