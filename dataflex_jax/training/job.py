"""What a run consists of, and how it ended."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float64, Int64, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.sampler import Plan
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.reporting.run_log import LogSettings
from dataflex_jax.selection.windows import Draws, Selection
from dataflex_jax.training.between import Updates
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.evaluation import Evaluator
from dataflex_jax.training.ledger import Publishing
from dataflex_jax.training.oversampling import TargetDraws
from dataflex_jax.training.resume import Identity
from dataflex_jax.training.state import TrainState


class Cadence(NamedTuple):
    """How often things happen, in optimizer steps."""

    train_step: int
    checkpoint: int


class Job(NamedTuple):
    """What a run consists of, put together by assembly.py.

    Attributes:
        policies: at work.
        step: the jitted train step, `(state, batch) -> (state, metrics)`, state donated.
        model: trained parameters -> the model.
        updates: what policies decide between two steps.
        evaluators: what is evaluated on the way.
        draws: where rows come from.
        loader: turns rows into batches.
        compared: rows of the target set that a selector compares a step's with; None: it compares with none.
        publishing: when the mixer's weights take effect.
        cadence: when to stop and to save.
        log: what the run writes.
        identity: what checkpoints remember.
        checkpoints: of the run.
        stop_requested: whether to save and stop, the same answer at the same step on every host.
    """

    policies: ActivePolicies
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, PyTree]]]
    model: Callable[[PyTree], Model]
    updates: Updates
    evaluators: Sequence[Evaluator]
    draws: Draws
    loader: Loader
    compared: TargetDraws | None
    publishing: Publishing
    cadence: Cadence
    log: LogSettings
    identity: Identity
    checkpoints: Checkpoints
    stop_requested: Callable[[int], bool]

    def load(self, plan: Plan, rows: Int64[np.ndarray, " B"], drawn_with: Float64[np.ndarray, " K"]) -> Batch:
        """The batch of a plan, its rows being these."""
        batch = self.loader.load(rows, drawn_with)
        if self.compared is None or len(rows) == self.draws.sampler.batch_size:
            return batch
        return dataclasses.replace(batch, targets=self.compared.load(plan.step))

    @property
    def selection(self) -> Selection | None:
        """What a selector or an order has decided."""
        return self.updates.selection

    @property
    def average(self) -> Callable[[PyTree], Float[Array, " K"]] | None:
        """The mixer's state -> proportions for later runs, or None."""
        return self.policies.mixer.policy.average


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: the last one done.
        preempted: whether it was asked to stop before the end.
        tokens_seen: tokens trained on, those that count in the loss.
        tokens_per_second: over the last steps; None where unknown.
        mfu: over the last steps; None where unknown.
    """

    step: int
    preempted: bool
    tokens_seen: int = 0
    tokens_per_second: float | None = None
    mfu: float | None = None
