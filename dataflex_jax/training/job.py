"""What a run consists of, and how it ended."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.loader import Batch, Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sampler import Sampler, SamplerState
from dataflex_jax.data.window import Sequences
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.selection.windows import Selection
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.resume import Identity
from dataflex_jax.training.step import PyTree, TrainState


class Cadence(NamedTuple):
    """How often things happen, in optimizer steps; 0 for `evaluate` means only after the last."""

    train_step: int
    log: int
    evaluate: int
    checkpoint: int


class Job(NamedTuple):
    """What a run consists of, put together by assembly.py.

    Attributes:
        step: the jitted train step, `(state, batch) -> (state, metrics)`, state donated.
        evaluate: parameters -> record for eval.jsonl.
        between: what policies decide between two steps; see `Updates.between`.
        selection: the part of it that checkpoints hold beside the state, or None.
        stop_requested: whether to save and stop, the same answer at the same step on every host.
        sampler: draws plans.
        sequences: turns plans into rows.
        loader: turns rows into batches.
        pool: the training rows.
        domains: the K domains.
        mixer: the mixer's name, or None where it is off.
        policies: whether policy.jsonl is written.
        average: the mixer's state -> proportions for later runs, or None.
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
    between: Callable[[int, TrainState, SamplerState], tuple[TrainState, list[dict[str, Any]]]]
    selection: Selection | None
    stop_requested: Callable[[int], bool]
    sampler: Sampler
    sequences: Sequences
    loader: Loader
    pool: Pool
    domains: Sequence[Domain]
    mixer: str | None
    policies: bool
    average: Callable[[PyTree], Float[Array, " K"]] | None
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
