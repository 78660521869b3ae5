"""What a run consists of, and how it ended."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dataflex_jax.checkpoint import Checkpoints
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.loader import Batch, Loader
from dataflex_jax.data.sampler import Sampler
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.resume import Identity
from dataflex_jax.state import PyTree, TrainState


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
        domains: the K domains.
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
    domains: Sequence[Domain]
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
