"""From a step's metrics to the run folder's lines, the progress bar and the sampler's published weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.data import sampler as sampling
from dataflex_jax.data.sampler import Plan
from dataflex_jax.errors import TrainingError
from dataflex_jax.files import JsonlWriter
from dataflex_jax.reporting.progress import Progress, Throughput
from dataflex_jax.reporting.trackers import MetricsLogger
from dataflex_jax.training.domain_weights import write_weights
from dataflex_jax.training.job import Job
from dataflex_jax.training.resume import Position
from dataflex_jax.training.step import PyTree

WEIGHTS_FILE = "domain_weights.json"
_OF_WEIGHTERS = ("example_weight_min", "example_weight_max", "example_weight_mean", "effective_sample_size")


class Dispatched(NamedTuple):
    """A step that the device may still be running, and its rows of the pool."""

    plan: Plan
    rows: np.ndarray
    metrics: dict[str, PyTree]


class RunLog:
    """Everything that a run writes while it trains; on every process but the first only the bookkeeping.

    Args:
        job: the run.
        run_folder: lines beyond `position` that are there already are dropped.
        position: where the run begins or goes on.
    """

    def __init__(self, job: Job, run_folder: Path, position: Position):
        self._job, self._folder = job, run_folder
        self._names = [domain.name for domain in job.domains]
        self._rows = np.array([domain.train.num_rows for domain in job.domains])
        self.natural = self._rows / self._rows.sum()
        self.tokens_seen = position.tokens_seen
        self.rows_seen = position.rows_seen.copy()
        done = position.sampler.step
        self._metrics = MetricsLogger(run_folder, tensorboard=job.tensorboard, wandb=job.wandb_project)
        self._main = jax.process_index() == 0
        self._policy = JsonlWriter(run_folder / "policy.jsonl") if self._main and job.policies else None
        self._evaluations = JsonlWriter(run_folder / "eval.jsonl") if self._main else None
        for writer in (self._metrics, self._evaluations):
            if writer is not None:
                writer.truncate_after(done)
        if self._policy is not None:
            # What was decided after the checkpoint's step is decided again.
            self._policy.truncate_after(done, lambda record: record["step"] == done and "observed" not in record)
        if self._main and job.selection is not None:
            job.selection.forget_after(done)
        self._throughput = Throughput(flops_per_token=job.flops_per_token, peak_flops=job.peak_flops)
        self._progress = Progress(job.cadence.train_step, done)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._progress, self._metrics, self._policy, self._evaluations):
            if writer is not None:
                writer.close()

    def rates(self) -> tuple[float | None, float | None]:
        """(tokens per second, MFU) over the last steps; None where unknown."""
        return self._throughput.tokens_per_second, self._throughput.mfu

    def paused(self):
        """Keeps the time of what is done inside out of the rates."""
        return self._throughput.excluded()

    def process(self, dispatched: Dispatched, planned: sampling.SamplerState) -> sampling.SamplerState:
        """Waits for a step, writes its lines, and returns the sampler with what the step published.

        Raises:
            TrainingError: its loss, its gradient or what the mixer made of it is not finite.
        """
        values = jax.device_get(dispatched.metrics)
        step = dispatched.plan.step
        self._domain_rows = values["domain_rows"]
        self._check_finite(step, values)
        self.tokens_seen += int(values["tokens"])
        self.rows_seen += np.bincount(self._job.pool.domain_of(dispatched.rows), minlength=len(self._names))
        self._throughput.update(int(values["inputs"]))
        published = self._job.schedule.is_update(step)
        effective_step = step + 1 + self._job.lag
        if published:
            planned = sampling.publish(planned, effective_step, values["sampling_weights"])
        if self._policy is not None and self._job.mixer:
            excess = {"excess": self._seen(values, "domain_excess")} if "domain_excess" in values else {}
            self._policy.write(
                {
                    "step": step,
                    "policy": self._job.mixer,
                    "observed": {
                        "domain_loss": self._seen(values, "domain_loss"),
                        "domain_rows": self._by_name(values["domain_rows"]),
                        "drawn_with": self._by_name(values["drawn_with"]),
                        **excess,
                    },
                    "state": _named(values["mixer"], self._names),
                    "sampling_weights": self._by_name(values["sampling_weights"]),
                    "published": published,
                    "effective_step": effective_step if published else None,
                }
            )
        if step % self._job.cadence.log == 0 or step == self._job.cadence.train_step:
            self._log(step, values)
        tokens_per_second, _ = self.rates()
        self._progress.update(step, loss=values["loss"], tokens_per_second=tokens_per_second)
        return planned

    def decided(self, record: dict[str, Any]) -> None:
        """Writes what was decided between two steps."""
        if self._policy is not None:
            self._policy.write(record)
        if "file" in record:
            self._progress.message(
                f"step {record['step']}: {record['policy']} chose {record['selected']} of {record['pool']} examples in "
                f"{record['seconds']:.1f} s"
            )

    def evaluated(self, step: int, record: dict[str, Any]) -> None:
        """Writes an evaluation."""
        if self._evaluations is not None:
            self._evaluations.write({"step": step, **record})
        self._metrics.track(step, record, f"eval/{record['split']}")
        if record["overall"]:
            figures = ", ".join(f"{name} {value['nll']:.3f}" for name, value in record["domains"].items())
            self._progress.message(f"step {step}: held-out nll {record['overall']['nll']:.4f} ({figures})")

    def saved(self, step: int, mixer: PyTree) -> None:
        """Writes what later runs may sample with, where the mixer has such a thing."""
        if self._main and self._job.average is not None:
            weights = np.asarray(self._job.average(jax.device_get(mixer)), np.float64)
            write_weights(self._folder / WEIGHTS_FILE, self._names, weights, mixer=self._job.mixer, step=step)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        tokens_per_second, mfu = self.rates()
        self._metrics.log(
            step,
            {
                "loss": values["loss"],
                "learning_rate": values["learning_rate"],
                "grad_norm": values["grad_norm"],
                "tokens_seen": self.tokens_seen,
                "tokens_per_second": tokens_per_second,
                "mfu": mfu,
                "domain_loss": self._seen(values, "domain_loss"),
                "domain_epochs": self._by_name(self.rows_seen / self._rows),
                **{name: values[name] for name in _OF_WEIGHTERS if name in values},
                **({"domain_excess": self._seen(values, "domain_excess")} if "domain_excess" in values else {}),
            },
        )

    def check_state(self, step: int, finite: bool) -> None:
        """Refuses to evaluate or save what the last step made of the parameters, the optimizer and the mixer.

        Raises:
            TrainingError: they are not all finite.
        """
        if not finite:
            raise self._not_finite("a parameter or optimizer moment is not finite", step)

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise self._not_finite(f"{name} is {values[name]}", step)
        for name in ("mixer", "sampling_weights"):
            floats = [leaf for leaf in jax.tree.leaves(values[name]) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
            if not all(np.isfinite(leaf).all() for leaf in floats):
                described = _named(values[name], self._names)
                raise self._not_finite(f"mixer {self._job.mixer}: not all finite, {name} = {described}", step)

    def _not_finite(self, what: str, step: int) -> TrainingError:
        rows = ", ".join(f"{n} of {name}" for name, n in self._by_name(self._domain_rows).items() if n)
        return TrainingError(f"{what} at step {step}; rows in the batch: {rows}; {self._job.checkpoints.last_good()}")

    def _by_name(self, values: np.ndarray) -> dict[str, Any]:
        return dict(zip(self._names, values, strict=True))

    def _seen(self, values: dict[str, Any], name: str) -> dict[str, Any]:
        """A figure by domain; None for the domains that are not in the batch."""
        seen = values["domain_rows"] > 0
        return {n: x if s else None for n, x, s in zip(self._names, values[name], seen, strict=True)}


def _named(state: PyTree, names: Sequence[str]) -> Any:
    """A policy's state for the log: arrays over the domains by name, others as lists; histories are left out."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, dict):
        return {
            key: _named(value, names)
            for key, value in state.items()
            if isinstance(value, dict) or hasattr(value, "_asdict") or np.ndim(value) < 2
        }
    if np.ndim(state) and len(state) == len(names):
        return {name: np.asarray(value).tolist() for name, value in zip(names, state, strict=True)}
    return np.asarray(state).tolist()
