"""What a run shows while it trains: metrics.jsonl, TensorBoard, Weights & Biases, a progress line, throughput.

Everything here runs on the host and takes Python, numpy or JAX values; nothing is traced.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from dataflex_jax.errors import InputError
from dataflex_jax.records import NULLABLE, JsonlWriter, read_jsonl, to_jsonable, write_summary

__all__ = [
    "NULLABLE",
    "JsonlWriter",
    "MetricsLogger",
    "Progress",
    "Throughput",
    "flatten",
    "read_jsonl",
    "write_summary",
]


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
    """Writes metrics.jsonl and sends the same scalars to TensorBoard and, if asked, Weights & Biases.

    On every process but the first it does nothing, so that callers need no condition.

    Args:
      run_folder: metrics.jsonl is written there, TensorBoard events under `tensorboard/`.
      tensorboard: whether to write TensorBoard events.
      wandb: None (off), a project name, or the arguments of `wandb.init` (project, entity, name, mode, ...).
        The run's id is kept in `wandb_id` in the run folder, so that a resumed run continues the same curves.

    Raises:
      InputError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        wandb: str | Mapping[str, Any] | None = None,
    ):
        self._folder = Path(run_folder)
        self._active = jax.process_index() == 0
        self._use_tensorboard = tensorboard and self._active
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._wandb = _wandb_run(self._folder, wandb) if wandb and self._active else None
        self._jsonl = JsonlWriter(self._folder / "metrics.jsonl") if self._active else None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the metrics of one step; nested mappings are kept in the file and flattened with "/" for curves.

        Raises:
          TrainingError: a NaN or infinity outside `NULLABLE`; names the field.
        """
        if self._jsonl is not None:
            self._jsonl.write({"step": step, **values})
            self.track(step, values)

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
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                logdir=str(self._folder / "tensorboard"),
                purge_step=self._purge_step,
                flush_secs=30,
                # Its own file names have a resolution of one second, and the later of two writers would overwrite.
                filename_suffix=f".{time.time_ns()}",
            )
        return self._tensorboard

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wandb_run(folder: Path, settings: str | Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise InputError("wandb is not installed; `pip install dataflex_jax[wandb]`, or set wandb to None") from error
    arguments = {"project": settings} if isinstance(settings, str) else dict(settings)
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "wandb_id"
    if "id" not in arguments and id_file.exists():
        arguments["id"] = id_file.read_text().strip()
    run = wandb.init(**{"dir": str(folder), "name": folder.name, "resume": "allow", **arguments})
    id_file.write_text(run.id + "\n")
    # Evaluations arrive after later training steps were logged; with wandb's own counter they would be dropped.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


class Progress:
    """A progress bar on stderr with loss, tokens/s and the time left; on other processes than the first, nothing.

    Where stderr is no terminal (a batch job's log) it prints a plain line every `seconds_between_lines` instead.

    Args:
      total: steps of the whole run.
      initial: steps done before, when resuming.
      unit: what one count is.
      seconds_between_lines: only for logs; a terminal is refreshed as tqdm does.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        unit: str = "step",
        *,
        seconds_between_lines: float = 30.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._file = file or sys.stderr
        self._active = jax.process_index() == 0
        self._total, self._initial, self._unit = total, initial, unit
        self._clock, self._interval = clock, seconds_between_lines
        self._start = self._last_line = clock()
        self._count = self._printed = initial
        self._note = ""
        terminal = self._active and self._file.isatty()
        self._bar = (
            tqdm(total=total, initial=initial, unit=unit, file=self._file, dynamic_ncols=True) if terminal else None
        )

    def update(self, count: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows that `count` of `total` are done, with the latest loss [nats/token] and rate, where they are known."""
        if not self._active:
            return
        parts = []
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if tokens_per_second is not None:
            parts.append(f"{tqdm.format_sizeof(float(tokens_per_second))} tokens/s")
        if parts:
            self._note = ", ".join(parts)
        self._count = count
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count - self._bar.n)
        elif count >= self._total or self._clock() - self._last_line >= self._interval:
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line of its own without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        elif self._active:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen or in the log."""
        if self._bar is not None:
            self._bar.close()
        elif self._active and self._count > self._printed:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line, self._printed = self._clock(), self._count
        line = tqdm.format_meter(
            self._count,
            self._total,
            self._last_line - self._start,
            ncols=0,
            unit=self._unit,
            initial=self._initial,
            postfix=self._note,
        )
        print(line, file=self._file, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Throughput:
    """Tokens per second over the last `window` steps, and the model FLOPs utilisation (MFU).

    MFU is tokens/s x FLOPs/token / peak FLOP/s (PaLM, arXiv:2204.02311, appendix B). The first step only starts the
    clock, so its compilation is not counted.

    Args:
      flops_per_token: of forward and backward pass of the model, without recomputation.
      peak_flops: dense FLOP/s of all devices of the run together; None where unknown, then `mfu` is None.
      window: steps.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token, self._peak_flops, self._clock = flops_per_token, peak_flops, clock
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=window + 1)
        self._tokens = 0
        self._excluded = 0.0

    def update(self, tokens: int) -> None:
        """Notes that a step of `tokens` tokens (all hosts) has ended: call it when its result is on the host."""
        self._tokens += tokens
        self._marks.append((self._clock() - self._excluded, self._tokens))

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Stops the clock for an evaluation, a checkpoint or a sweep."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - start

    @property
    def tokens_per_second(self) -> float | None:
        """None until the second step has ended."""
        if len(self._marks) < 2:
            return None
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else None

    @property
    def mfu(self) -> float | None:
        """A fraction of 1; None until the second step has ended or where the peak is unknown."""
        rate = self.tokens_per_second
        if rate is None or self._flops_per_token is None or self._peak_flops is None:
            return None
        return rate * self._flops_per_token / self._peak_flops
