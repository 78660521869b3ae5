"""A run folder's final summary, and all that it says read back for plots and the report."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.files import read_jsonl, replace_json, to_jsonable
from dataflex_jax.foreign import read_object


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
    """What a run folder says of its run; a file that is not there is an empty mapping or list."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    policy: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def load(cls, run_folder: str | os.PathLike[str]) -> Self:
        """Reads config.json, metrics.jsonl, policy.jsonl, eval.jsonl and summary.json.

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
            metrics=_read_lines(folder / "metrics.jsonl"),
            policy=_read_lines(folder / "policy.jsonl"),
            evals=_read_lines(folder / "eval.jsonl"),
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
