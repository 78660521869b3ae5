"""The books of a run: where it stands, and what a finished step makes of that. Pure, on the host."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from dataflex_jax.data import sampler as sampling
from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.policies.contract import distribution_fault
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.reporting.run_log import named_state
from dataflex_jax.training.objective import WEIGHT_BOUNDS

# Of the metrics of a step, by name; see `TrainStep`.
Values = dict[str, Any]


class Position(NamedTuple):
    """Where a run stands beside its TrainState.

    Attributes:
        sampler: what is drawn next.
        tokens_seen: tokens trained on so far, those that count in the loss.
        rows_seen: rows of each domain drawn so far; trained on, but for those that a selector has left out in the step.
    """

    sampler: SamplerState
    tokens_seen: int
    rows_seen: Int64[np.ndarray, " K"]


class Done(NamedTuple):
    """A step that the device has finished.

    Attributes:
        step: its number.
        rows: of each domain in its batch, int64 [K].
        values: its metrics, on the host.
    """

    step: int
    rows: Int64[np.ndarray, " K"]
    values: Values


class Publishing(NamedTuple):
    """When what a mixer decides takes effect: `lag` further steps after the schedule publishes it."""

    schedule: Schedule
    lag: int

    def effective_step(self, step: int) -> int | None:
        """The first step that is drawn with what step `step` made of the weights; None where they are not published."""
        return step + 1 + self.lag if self.schedule.is_update(step) else None


def advanced(position: Position, done: Done, publishing: Publishing) -> Position:
    """The position after a step: its tokens and rows counted, the weights published that are due."""
    planned = position.sampler
    effective_step = publishing.effective_step(done.step)
    if effective_step is not None:
        planned = sampling.publish(planned, effective_step, done.values["sampling_weights"])
    return Position(planned, position.tokens_seen + int(done.values["tokens"]), position.rows_seen + done.rows)


def fault(done: Done, domains: Sequence[str], mixer: str, weighing: str = "") -> str | None:
    """Why a run cannot go on from a step; None: it can.

    Its loss, its gradient or its mixer is not finite, the mixer's weights are no distribution, or a weighter's are
    negative or not finite.

    Args:
        done: the step.
        domains: their names.
        mixer: its name.
        weighing: the policies that weight the loss, in words.
    """
    values = done.values
    # Where the losses themselves are finite, the weights are to blame for what is not.
    if np.isfinite(values["domain_loss"]).all() and (wrong := _wrong_weight(values)) is not None:
        return at(f"{weighing}: a weight of the loss is {wrong}, not finite and >= 0,", done, domains)
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            return at(f"{name} is {values[name]}", done, domains)
    for name in ("mixer", "sampling_weights"):
        floats = [leaf for leaf in jax.tree.leaves(values[name]) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if not all(np.isfinite(leaf).all() for leaf in floats):
            described = named_state(values[name], domains)
            return at(f"mixer {mixer}: not all finite, {name} = {described}", done, domains)
    if wrong := distribution_fault(values["sampling_weights"]):
        described = named_state(values["sampling_weights"], domains)
        return at(f"mixer {mixer}: no distribution ({wrong}), sampling_weights = {described}", done, domains)
    return None


def counts_nothing(done: Done) -> bool:
    """Whether the weights of the loss are all 0, so that a step has learned nothing from losses that are not."""
    return bool(done.values["loss"] == 0 and np.any(done.values["domain_loss"]))


def _wrong_weight(values: Values) -> float | None:
    found = [values[name] for name in WEIGHT_BOUNDS if name in values]
    return next((float(value) for value in found if not 0 <= value < math.inf), None)


def at(what: str, done: Done, domains: Sequence[str]) -> str:
    """What went wrong, at which step and with which rows."""
    rows = ", ".join(f"{n} of {name}" for n, name in zip(done.values["domain_rows"], domains, strict=True) if n)
    return f"{what} at step {done.step}; rows in the batch: {rows}"
