"""What a run writes while it trains: the run folder's lines and the progress bar."""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dataflex_jax.json_lines import JsonlWriter, Written
from dataflex_jax.reporting.progress import Progress, Throughput
from dataflex_jax.reporting.trackers import MetricsLogger

logger = logging.getLogger(__name__)

METRICS, POLICY, EVALUATIONS = "metrics.jsonl", "policy.jsonl", "eval.jsonl"
# When each line of METRICS was written: beside them, as these are the same to the bit where a run is repeated.
TIMES = "times.jsonl"
_OF_WEIGHTERS = ("example_weight_min", "example_weight_max", "example_weight_mean", "effective_sample_size")
_OF_ROUTERS = ("router_balancing_loss", "router_z_loss")
# Of a selection's line, what becomes curves.
_OF_SELECTIONS = (
    *("selected", "distinct", "not_finite", "coverage", "overlap", "domain_share"),
    *("score_min", "score_mean", "score_max"),
)


class LogSettings(NamedTuple):
    """What a run's log needs to know of the run.

    Attributes:
        domains: number of training rows by name.
        mixer: the mixer's name; None: there is none to log.
        mixer_log: the mixer's state -> what of it is logged; None: see `named_state`.
        policies: whether policy.jsonl is written.
        log_every: steps between lines of metrics.jsonl.
        train_step: steps of the whole run.
        tensorboard: whether to write TensorBoard events.
        wandb_project: Weights & Biases project, or None.
        config: the run's configuration, for Weights & Biases.
        flops_per_token: of the model, forward and backward.
        peak_flops: of all devices together; None where unknown.
    """

    domains: dict[str, int]
    mixer: str | None
    mixer_log: Callable[[PyTree], Any] | None
    policies: bool
    log_every: int
    train_step: int
    tensorboard: bool
    wandb_project: str | None
    config: dict[str, Any]
    flops_per_token: float
    peak_flops: float | None


class Standing(NamedTuple):
    """What a step's lines say beside its metrics.

    Attributes:
        tokens_seen: so far.
        rows_seen: of each domain so far, [K].
        effective_step: the first step that is drawn with the step's weights; None where they are not published.
    """

    tokens_seen: int
    rows_seen: np.ndarray
    effective_step: int | None


class RunLog:
    """The run folder's lines, TensorBoard, Weights & Biases and the progress bar; written by the first process alone.

    Args:
        settings: of the run.
        run_folder: lines beyond `done` that are there already are dropped.
        done: steps that were done before.
        lines: how far its files had come then, as `synced` gave it; empty where that is not known.
    """

    def __init__(
        self, settings: LogSettings, run_folder: Path, done: int, lines: Mapping[str, Written] = MappingProxyType({})
    ):
        main = jax.process_index() == 0
        if main:
            go_back(run_folder, done, lines)
        self._settings, self._names = settings, list(settings.domains)
        self._rows = np.array(list(settings.domains.values()))
        self._metrics = MetricsLogger(
            run_folder, tensorboard=settings.tensorboard, wandb=settings.wandb_project, config=settings.config
        )
        self._metrics.truncate_after(done)
        self._policy = JsonlWriter(run_folder / POLICY) if main and settings.policies else None
        self._evaluations = JsonlWriter(run_folder / EVALUATIONS) if main else None
        self._times = JsonlWriter(run_folder / TIMES) if main else None
        self._throughput = Throughput(flops_per_token=settings.flops_per_token, peak_flops=settings.peak_flops)
        self._progress = Progress(settings.train_step, done)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._progress, self._metrics, self._policy, self._evaluations, self._times):
            if writer is not None:
                writer.close()

    def synced(self) -> dict[str, Written]:
        """How far each file of lines has come, once it is on the disk; nothing on every process but the first."""
        writers = {METRICS: self._metrics, POLICY: self._policy, EVALUATIONS: self._evaluations, TIMES: self._times}
        found = {name: writer.synced() for name, writer in writers.items() if writer is not None}
        return {name: written for name, written in found.items() if written is not None}

    def rates(self) -> tuple[float | None, float | None]:
        """(tokens per second, MFU) over the last steps; None where unknown."""
        return self._throughput.tokens_per_second, self._throughput.mfu

    def paused(self):
        """Keeps the time of what is done inside out of the rates."""
        return self._throughput.excluded()

    def stepped(self, step: int, values: dict[str, Any], standing: Standing) -> None:
        """Writes the lines of a step from its metrics."""
        self._throughput.update(int(values["inputs"]))
        curves = {}
        if self._policy is not None and self._settings.mixer:
            mixed = self._mixed(step, values, standing)
            self._policy.write(mixed)
            weights = {"sampling_weights": mixed["sampling_weights"], "drawn_with": mixed["observed"]["drawn_with"]}
            curves = {**weights, "mixer": mixed["state"]}
        if step % self._settings.log_every == 0 or step == self._settings.train_step:
            self._metrics.log(step, self._measured(values, standing), curves)
            if self._times is not None:
                self._times.write({"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")})
        tokens_per_second, _ = self.rates()
        self._progress.update(step, loss=values["loss"], tokens_per_second=tokens_per_second)

    def decided(self, record: dict[str, Any]) -> None:
        """Writes what was decided between two steps."""
        if self._policy is not None:
            self._policy.write(record)
        if "file" in record:
            self._metrics.track(record["step"], {name: record[name] for name in _OF_SELECTIONS}, "selection")
            self._progress.message(
                f"step {record['step']}: {record['policy']} chose {record['selected']} of {record['pool']} examples in "
                f"{record['seconds']:.1f} s"
            )

    def evaluated(self, step: int, record: dict[str, Any]) -> None:
        """Writes an evaluation: its `split`, metrics of its `domains` (any groups) and `overall`."""
        if self._evaluations is not None:
            self._evaluations.write({"step": step, **record})
        self._metrics.track(step, record, f"eval/{record['split']}")
        if record["overall"]:
            self._progress.message(f"step {step}: {_in_words(record)}")

    def _mixed(self, step: int, values: dict[str, Any], standing: Standing) -> dict[str, Any]:
        state = values["mixer"]
        log = self._settings.mixer_log
        return {
            "step": step,
            "policy": self._settings.mixer,
            "observed": {
                "domain_loss": self._seen(values, "domain_loss"),
                "domain_rows": self._by_name(values["domain_rows"]),
                "drawn_with": self._by_name(values["drawn_with"]),
                **({"excess": self._seen(values, "domain_excess")} if "domain_excess" in values else {}),
            },
            "state": named_state(state if log is None else log(state), self._names),
            "sampling_weights": self._by_name(values["sampling_weights"]),
            "published": standing.effective_step is not None,
            "effective_step": standing.effective_step,
        }

    def _measured(self, values: dict[str, Any], standing: Standing) -> dict[str, Any]:
        tokens_per_second, mfu = self.rates()
        return {
            "loss": values["loss"],
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "tokens_seen": standing.tokens_seen,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "domain_loss": self._seen(values, "domain_loss"),
            "domain_epochs": self._by_name(standing.rows_seen / self._rows),
            **{name: values[name] for name in (*_OF_WEIGHTERS, *_OF_ROUTERS) if name in values},
            **({"domain_excess": self._seen(values, "domain_excess")} if "domain_excess" in values else {}),
            **({"domain_kept": self._known(values["domain_kept"])} if "domain_kept" in values else {}),
            **({"domain_router_load": self._seen(values, load)} if (load := "domain_router_load") in values else {}),
        }

    def _known(self, values: np.ndarray) -> dict[str, Any]:
        return {name: None if np.isnan(value) else value for name, value in self._by_name(values).items()}

    def _by_name(self, values: np.ndarray) -> dict[str, Any]:
        return dict(zip(self._names, values, strict=True))

    def _seen(self, values: dict[str, Any], name: str) -> dict[str, Any]:
        """A figure by domain; None for the domains that are not in the batch."""
        seen = values["domain_rows"] > 0
        return {n: x if s else None for n, x, s in zip(self._names, values[name], seen, strict=True)}


def go_back(run_folder: Path, done: int, lines: Mapping[str, Written]) -> None:
    """Drops the lines beyond the first `done` steps; says so where those before are not as they were.

    Args:
        run_folder: whose files.
        done: steps that stay.
        lines: how far the files had come then, as `RunLog.synced` gave it; empty where that is not known.
    """

    def decided_again(record: dict[str, Any]) -> bool:
        return record["step"] == done and "observed" not in record

    for name in (METRICS, POLICY, EVALUATIONS, TIMES):
        if name not in lines and not (run_folder / name).exists():
            continue
        redone = {"redone": decided_again} if name == POLICY else {}
        with JsonlWriter(run_folder / name) as writer:
            fault = writer.truncate_after(done, written=lines.get(name), **redone)
        if fault is not None:
            logger.warning("%s.", fault)


def named_state(state: PyTree, names: Sequence[str]) -> Any:
    """A policy's state for the log: arrays over the domains by name, others as lists; histories are left out."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, dict):
        return {
            key: named_state(value, names)
            for key, value in state.items()
            if isinstance(value, dict) or hasattr(value, "_asdict") or np.ndim(value) < 2
        }
    if isinstance(state, jax.Array) and jnp.issubdtype(state.dtype, jax.dtypes.prng_key):
        state = jax.random.key_data(state)
    if np.ndim(state) and len(state) == len(names):
        return {name: np.asarray(value).tolist() for name, value in zip(names, state, strict=True)}
    return np.asarray(state).tolist()


def _in_words(record: dict[str, Any]) -> str:
    overall = record["overall"]
    if "nll" in overall:
        figures = ", ".join(f"{name} {value['nll']:.3f}" for name, value in record["domains"].items() if "nll" in value)
        return f"held-out nll {overall['nll']:.4f} ({figures})"
    return f"{record['split']} " + ", ".join(f"{name} {value:.4g}" for name, value in overall.items())
