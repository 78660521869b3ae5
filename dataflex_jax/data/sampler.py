"""Which rows come next: a pure function of the seed, the step, the cursors and the mixture weights.

Guarantees:
    * Every host computes the same plan; a plan depends on nothing but its arguments.
    * With "systematic" drawing each domain's count is within 1 of `B * w_i`, and its expectation is `B * w_i`. Domains
      are gone through in another order at every step, so that none always comes together with its neighbours.
    * Cursors only advance by what was drawn: a change of weights, a further domain or a resume neither skips nor
      repeats a row, and each epoch of a domain visits every row once.
    * A domain with a limit never gives more rows than that; the others share what it would have given in proportion.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dataflex_jax.errors import InputError, TrainingError

VERSION = 2


class SamplerState(NamedTuple):
    """Where the sampler stands between two steps.

    Attributes:
        step: optimizer steps planned so far.
        cursors: rows taken from each domain so far, int64 [K].
        weights: the proportions in effect, float64 [K].
        pending: published proportions that are not yet in effect: (first step that they apply to, float64 [K]), in
            order.
        version: what draws the run began with, and goes on with. 1: systematic draws go through the domains in their
            own order; a selector's choice of more rows than there are is shuffled with its repeats. 2: as they are now.
    """

    step: int
    cursors: Int64[np.ndarray, " K"]
    weights: Float64[np.ndarray, " K"]
    pending: tuple[tuple[int, Float64[np.ndarray, " K"]], ...] = ()
    version: int = VERSION


class Plan(NamedTuple):
    """The rows of one optimizer step.

    Attributes:
        step: its number, from 1.
        domains: domain of each row, int64 [B].
        positions: position of each row in its domain's endless sequence of shuffled epochs, int64 [B].
        drawn_with: the proportions it was drawn with, float64 [K].
    """

    step: int
    domains: Int64[np.ndarray, " B"]
    positions: Int64[np.ndarray, " B"]
    drawn_with: Float64[np.ndarray, " K"]


class Sampler(NamedTuple):
    """Draws plans.

    Attributes:
        seed: of all draws.
        batch_size: rows of a plan.
        draw: "systematic" or "multinomial".
        rows_of: step -> rows of its plan, where steps are drawn more of than they train on; None: `batch_size`.
        most: how many rows each domain gives in the whole run, after which the others share its part; None: no limit.
    """

    seed: int
    batch_size: int
    draw: str
    rows_of: Callable[[int], int] | None = None
    most: tuple[int, ...] | None = None

    def rows(self, step: int) -> int:
        """How many rows a step's plan has."""
        return self.batch_size if self.rows_of is None else self.rows_of(step)

    def plan(self, state: SamplerState) -> tuple[Plan, SamplerState]:
        """The next step's rows and the state after it.

        Raises:
            TrainingError: all domains with a weight have given the rows that they may.
        """
        step = state.step + 1
        rows = self.rows(step)
        weights, pending = state.weights, state.pending
        while pending and pending[0][0] <= step:
            weights, pending = pending[0][1], pending[1:]
        random = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        permuted = self.draw == "systematic" and state.version > 1
        # Sorting uniforms is stable across NumPy's versions.
        through = np.argsort(random.random(len(weights)), kind="stable") if permuted else np.arange(len(weights))
        drawn_with = weights
        if self.most is None:
            counts = self._counts(rows, weights, through, random)
        else:
            drawn_with, counts = self._limited(
                step, rows, weights, np.array(self.most) - state.cursors, through, random
            )
        domains = np.repeat(np.arange(len(weights)), counts)
        positions = np.concatenate([c + np.arange(n) for c, n in zip(state.cursors, counts, strict=True)])
        # Every shard and microbatch gets its share of every domain.
        order = np.argsort(random.random(rows), kind="stable")
        plan = Plan(step, domains[order], positions[order], drawn_with)
        return plan, state._replace(step=step, cursors=state.cursors + counts, weights=weights, pending=pending)

    def exhausted(self, before: SamplerState, after: SamplerState) -> tuple[int, ...]:
        """The domains that gave the last of the rows that they may between two states."""
        if self.most is None:
            return ()
        most = np.array(self.most)
        return tuple(np.flatnonzero((before.cursors < most) & (after.cursors >= most)).tolist())

    def _limited(
        self,
        step: int,
        rows: int,
        weights: np.ndarray,
        left: np.ndarray,
        through: np.ndarray,
        random: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(the proportions of the domains with rows left, rows of each), none of more rows than it has left."""
        counts, drawn_with = np.zeros(len(weights), np.int64), None
        while (missing := rows - int(counts.sum())) > 0:
            open_weights = np.where(counts < left, weights, 0.0)
            if open_weights.sum() == 0:
                gave = f"at step {step} all domains with a weight have given the epochs of config.data.max_epochs"
                raise TrainingError(f"{gave}; {missing} rows are missing")
            if drawn_with is None:
                drawn_with = open_weights / open_weights.sum() if (left <= 0).any() else weights
            counts = np.minimum(counts + self._counts(missing, open_weights, through, random), np.maximum(left, 0))
        return drawn_with, counts

    def _counts(self, rows: int, weights: np.ndarray, through: np.ndarray, random: np.random.Generator) -> np.ndarray:
        weights = weights[through]
        edges = np.cumsum(weights) / np.sum(weights)
        edges[np.flatnonzero(weights)[-1] :] = 1.0
        if self.draw == "systematic":
            upper = np.floor(edges * rows + random.random())
        else:
            upper = np.searchsorted(np.sort(random.random(rows)), edges)
        counts = np.zeros(len(weights), np.int64)
        counts[through] = np.diff(upper, prepend=0)
        return counts


def publish(state: SamplerState, effective_step: int, weights: np.ndarray) -> SamplerState:
    """Puts weights in effect from `effective_step` on, in place of what was published for that step or later ones.

    (That happens where a run goes on with a shorter lag.)

    Raises:
        ValueError: weights that are no distribution; an effective step in the past.
    """
    weights = np.asarray(weights, np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"a mixer published weights that are no distribution: {weights.tolist()}")
    if effective_step <= state.step:
        raise ValueError(f"weights published for step {effective_step}: the first step still open is {state.step + 1}")
    earlier = (published for published in state.pending if published[0] < effective_step)
    return state._replace(pending=(*earlier, (effective_step, weights / weights.sum())))


def to_json(state: SamplerState, names: tuple[str, ...]) -> dict:
    """The state by domain name, for a checkpoint; floats survive JSON exactly."""
    return {
        "version": state.version,
        "step": state.step,
        "cursors": dict(zip(names, state.cursors.tolist(), strict=True)),
        "weights": dict(zip(names, state.weights.tolist(), strict=True)),
        "pending": [[step, dict(zip(names, w.tolist(), strict=True))] for step, w in state.pending],
    }


def from_json(saved: dict, names: tuple[str, ...]) -> SamplerState:
    """The state that `to_json` wrote, with new domains among `names` at cursor 0 and weight 0.

    Raises:
        InputError: a saved domain that is not among `names`.
    """
    for name in saved["cursors"]:
        if name not in names:
            raise InputError(
                f"the checkpoint's domain {name!r} is missing; keep it (with proportion 0 to stop drawing from it)",
                option="data.domains",
            )

    def align(values: dict, dtype: type) -> np.ndarray:
        return np.array([values.get(name, 0) for name in names], dtype)

    return SamplerState(
        step=saved["step"],
        cursors=align(saved["cursors"], np.int64),
        weights=align(saved["weights"], np.float64),
        pending=tuple((step, align(w, np.float64)) for step, w in saved["pending"]),
        version=saved.get("version", 1),
    )
