"""Where a run's metrics go while it trains: metrics.jsonl, TensorBoard, Weights & Biases.

Everything here runs on the host and takes Python, numpy or JAX values; nothing is traced.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Self

import jax

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import to_jsonable
from dataflex_jax.json_lines import JsonlWriter, Written


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by "/": {"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat = flatten(to_jsonable(values), prefix)
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


class MetricsLogger:
    """Writes metrics.jsonl and sends the same scalars, and others, to TensorBoard and, if asked, Weights & Biases.

    On every process but the first it does nothing, so that callers need no condition.

    Args:
        run_folder: metrics.jsonl is written there, TensorBoard events under `tensorboard/`.
        tensorboard: whether to write TensorBoard events.
        wandb: None (off), a project name, or the arguments of `wandb.init` (project, entity, name, mode, ...).
          The run's id is kept in `wandb_id` in the run folder, so that a resumed run continues the same curves.
        config: of the run, as `wandb.init` gets it.

    Raises:
        InputError: wandb is asked for and not installed, or cannot begin.
    """

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        wandb: str | Mapping[str, Any] | None = None,
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._folder = Path(run_folder)
        self._active = jax.process_index() == 0
        self._use_tensorboard = tensorboard and self._active
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._wandb = _wandb_run(self._folder, wandb, config) if wandb and self._active else None
        self._jsonl = JsonlWriter(self._folder / "metrics.jsonl") if self._active else None

    def log(self, step: int, values: Mapping[str, Any], curves: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Records the metrics of one step; nested mappings are kept in the file and flattened with "/" for curves.

        Args:
            step: its number.
            values: the metrics.
            curves: further numbers, for TensorBoard and wandb alone.

        Raises:
            TrainingError: a NaN or infinity outside `NULLABLE`; names the field.
        """
        if self._jsonl is not None:
            self._jsonl.write({"step": step, **values})
            self.track(step, {**values, **curves})

    def track(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Sends scalars to TensorBoard and wandb only, e.g. `track(step, record, "eval/valid")`; None is left out."""
        if not self._active:
            return
        scalars = _scalars(values, prefix)
        if self._use_tensorboard:
            writer = self._tensorboard_writer()
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **scalars})

    def truncate_after(self, step: int) -> None:
        """Forgets what was recorded after `step`: call it on resume, before the first `log`.

        metrics.jsonl loses those lines and TensorBoard hides those points. wandb keeps its history: the repeated
        steps, which are the same numbers, are there twice.
        """
        if self._jsonl is not None:
            self._jsonl.truncate_after(step)
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._tensorboard = None
            self._purge_step = step + 1

    def synced(self) -> Written | None:
        """How far metrics.jsonl has come, once it is on the disk; None on every process but the first."""
        return None if self._jsonl is None else self._jsonl.synced()

    def close(self) -> None:
        """Flushes and closes everything; the logger cannot be used afterwards."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _tensorboard_writer(self) -> Any:
        if self._tensorboard is None:
            from dataflex_jax.reporting.tensorboard import TensorBoard

            self._tensorboard = TensorBoard(self._folder / "tensorboard", self._purge_step)
        return self._tensorboard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def import_wandb(settings: str | Mapping[str, Any]) -> ModuleType:
    """The package, for what `MetricsLogger` takes as `wandb`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        reason = "wandb is not installed; `pip install dataflex_jax[wandb]`, or set it to None"
        raise InputError(reason, option="wandb_project", value=settings) from error
    return wandb


def _wandb_run(folder: Path, settings: str | Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    wandb = import_wandb(settings)
    arguments = {"project": settings} if isinstance(settings, str) else dict(settings)
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "wandb_id"
    if "id" not in arguments and id_file.exists():
        arguments["id"] = id_file.read_text().strip()
    try:
        run = wandb.init(
            **{"dir": str(folder), "name": folder.name, "resume": "allow", "config": to_jsonable(config), **arguments}
        )
    except wandb.errors.Error as error:  # such as no key, or no way to the server
        raise InputError(f"wandb: {one_line(error)}", option="wandb_project", value=settings) from error
    id_file.write_text(run.id + "\n")
    # Evaluations arrive after later training steps were logged; with wandb's own counter they would be dropped.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
