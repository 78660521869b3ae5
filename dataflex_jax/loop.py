"""The loop: dispatch a step, read the one before, publish what the mixer decided, save, evaluate, stop on request.

The host is never more than one step behind the device and never makes it wait: while step n runs, the metrics of step
n - 1 are read, weights that the schedule publishes are handed to the sampler, and the rows of step n + 1 are gathered.
"""

import collections
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dataflex_jax import preemption, resume
from dataflex_jax.checkpoint import Checkpoints
from dataflex_jax.data import sampler as sampling
from dataflex_jax.data.loader import Batch, Loader
from dataflex_jax.data.sampler import Plan, Sampler
from dataflex_jax.data.store import DomainStore
from dataflex_jax.errors import TrainingError
from dataflex_jax.metrics import JsonlWriter, MetricsLogger, Progress, Throughput
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.resume import Identity, Position
from dataflex_jax.state import PyTree, TrainState

logger = logging.getLogger(__name__)


class Cadence(NamedTuple):
    """How often things happen, in optimizer steps; 0 for `evaluate` means only after the last."""

    train_step: int
    log: int
    evaluate: int
    checkpoint: int


class Job(NamedTuple):
    """What a run consists of, assembled by train.py.

    Attributes:
        step: the jitted train step, `(state, batch) -> (state, metrics)`, state donated.
        evaluate: parameters -> record for eval.jsonl.
        sampler: draws plans.
        loader: turns plans into batches.
        stores: the K domains.
        seq_len: tokens a row.
        mixer: the mixer's name, or None where it is off and policy.jsonl is not written.
        schedule: when the mixer's weights are published.
        lag: further steps until they take effect.
        cadence: when to log, evaluate and save.
        identity: what checkpoints remember.
        checkpoints: of the run.
        flops_per_token: of the model, forward and backward.
        peak_flops: of all devices together; None where unknown.
        tensorboard: whether to write TensorBoard events.
        wandb_project: Weights & Biases project, or None.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, PyTree]]]
    evaluate: Callable[[PyTree], dict[str, Any]]
    sampler: Sampler
    loader: Loader
    stores: Sequence[DomainStore]
    seq_len: int
    mixer: str | None
    schedule: Schedule
    lag: int
    cadence: Cadence
    identity: Identity
    checkpoints: Checkpoints
    flops_per_token: float
    peak_flops: float | None
    tensorboard: bool
    wandb_project: str | None


class Outcome(NamedTuple):
    """How a run ended: the last step done, whether it was asked to stop before the end, and the last rates."""

    step: int
    preempted: bool
    tokens_seen: int
    tokens_per_second: float | None
    mfu: float | None


def run(job: Job, state: TrainState, position: Position, run_folder: Path) -> Outcome:
    """Trains from `state` and `position` to the end, or to the next step boundary after a request to stop.

    Raises:
        TrainingError: a non-finite loss or gradient, or a checkpoint that could not be written.
    """
    step, preempted = position.sampler.step, False
    if step >= job.cadence.train_step:
        logger.info("Nothing to do: the checkpoint is at step %d of config.train_step = %d.", step, job.cadence.train_step)
        return Outcome(step, preempted, position.tokens_seen, None, None)
    records = Records(job, run_folder, position)
    in_flight: collections.deque[Dispatched] = collections.deque()
    with preemption.watch() as stop_requested, ThreadPoolExecutor(1) as pool, records:
        plan, planned = job.sampler.plan(position.sampler)
        batch = pool.submit(job.loader.load, plan)
        for step in range(step + 1, job.cadence.train_step + 1):
            state, metrics = job.step(state, batch.result())
            in_flight.append(Dispatched(plan, planned.cursors, _start_fetch(metrics)))
            preempted = stop_requested(step)
            last = preempted or step == job.cadence.train_step
            evaluate = step == job.cadence.train_step or (job.cadence.evaluate and step % job.cadence.evaluate == 0)
            save = last or step % job.cadence.checkpoint == 0
            behind = 0 if evaluate or save else min(job.lag, 1)
            while len(in_flight) > behind:
                planned = records.process(in_flight.popleft(), planned)
            with records.paused():
                if evaluate:
                    records.evaluated(step, job.evaluate(state.params))
                if save:
                    at = Position(planned, records.tokens_seen)
                    job.checkpoints.save(step, state, resume.to_json(job.identity, at))
            if last:
                break
            plan, planned = job.sampler.plan(planned)
            batch = pool.submit(job.loader.load, plan)
        job.checkpoints.wait()
    return Outcome(step, preempted and step < job.cadence.train_step, records.tokens_seen, *records.rates())


class Dispatched(NamedTuple):
    """A step that the device may still be running."""

    plan: Plan
    cursors: np.ndarray
    metrics: dict[str, PyTree]


def _start_fetch(metrics: dict[str, PyTree]) -> dict[str, PyTree]:
    for leaf in jax.tree.leaves(metrics):
        leaf.copy_to_host_async()
    return metrics


class Records:
    """Turns the steps' metrics into the run folder's lines, the progress bar and the sampler's published weights."""

    def __init__(self, job: Job, run_folder: Path, position: Position):
        self._job = job
        self._names = [store.name for store in job.stores]
        self._rows = np.array([store.train.num_rows(job.seq_len) for store in job.stores])
        self.tokens_seen = position.tokens_seen
        done = position.sampler.step
        self._metrics = MetricsLogger(run_folder, tensorboard=job.tensorboard, wandb=job.wandb_project)
        self._main = jax.process_index() == 0
        self._policy = JsonlWriter(run_folder / "policy.jsonl") if self._main and job.mixer else None
        self._evaluations = JsonlWriter(run_folder / "eval.jsonl") if self._main else None
        for writer in (self._metrics, self._policy, self._evaluations):
            if writer is not None:
                writer.truncate_after(done)
        self._throughput = Throughput(flops_per_token=job.flops_per_token, peak_flops=job.peak_flops)
        self._progress = Progress(job.cadence.train_step, done)

    def __enter__(self) -> "Records":
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
            TrainingError: its loss or gradient is not finite.
        """
        values = jax.device_get(dispatched.metrics)
        step = dispatched.plan.step
        self._check_finite(step, values)
        self.tokens_seen += int(values["tokens"])
        self._throughput.update(int(values["tokens"]))
        published = self._job.schedule.is_update(step)
        effective_step = step + 1 + self._job.lag
        if published:
            planned = sampling.publish(planned, effective_step, values["sampling_weights"])
        if self._policy is not None:
            self._policy.write(
                {
                    "step": step,
                    "policy": self._job.mixer,
                    "observed": {
                        "domain_loss": self._domain_loss(values),
                        "domain_rows": self._by_name(values["domain_rows"]),
                        "drawn_with": self._by_name(values["drawn_with"]),
                    },
                    "state": _named(values["mixer"], self._names),
                    "sampling_weights": self._by_name(values["sampling_weights"]),
                    "published": published,
                    "effective_step": effective_step if published else None,
                }
            )
        if step % self._job.cadence.log == 0 or step == self._job.cadence.train_step:
            self._log(step, values, dispatched.cursors)
        tokens_per_second, _ = self.rates()
        self._progress.update(step, loss=values["loss"], tokens_per_second=tokens_per_second)
        return planned

    def evaluated(self, step: int, record: dict[str, Any]) -> None:
        """Writes an evaluation."""
        if self._evaluations is not None:
            self._evaluations.write({"step": step, **record})
        self._metrics.track(step, record, f"eval/{record['split']}")
        if record["overall"]:
            figures = ", ".join(f"{name} {value['nll']:.3f}" for name, value in record["domains"].items())
            self._progress.message(f"step {step}: held-out nll {record['overall']['nll']:.4f} ({figures})")

    def _log(self, step: int, values: dict[str, Any], cursors: np.ndarray) -> None:
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
                "domain_loss": self._domain_loss(values),
                "domain_epochs": self._by_name(cursors / self._rows),
            },
        )

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                rows = {name: int(n) for name, n in zip(self._names, values["domain_rows"], strict=True) if n}
                logger.error("Step %d is not finite; nothing after the last good checkpoint is kept.", step)
                raise TrainingError(
                    f"{name} is {values[name]} at step {step}; rows in the batch: "
                    f"{', '.join(f'{n} of {domain}' for domain, n in rows.items())}; {self._job.checkpoints.last_good()}"
                )

    def _by_name(self, values: np.ndarray) -> dict[str, Any]:
        return dict(zip(self._names, values, strict=True))

    def _domain_loss(self, values: dict[str, Any]) -> dict[str, Any]:
        seen = values["domain_rows"] > 0
        return {n: x if s else None for n, x, s in zip(self._names, values["domain_loss"], seen, strict=True)}


def _named(state: PyTree, names: Sequence[str]) -> Any:
    """A policy's state for the log: arrays over the domains by name, others as lists."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, dict):
        return {key: _named(value, names) for key, value in state.items()}
    if np.ndim(state) and len(state) == len(names):
        return {name: np.asarray(value).tolist() for name, value in zip(names, state, strict=True)}
    return np.asarray(state).tolist()
