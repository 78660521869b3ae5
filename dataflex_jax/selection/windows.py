"""Between two steps: a selector chooses the next window's examples, an order arranges them.

With a mixer, its weights say how many rows of each domain the window has, and selection is inside each domain. Without
one, selection is over the whole pool.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.data import window as windows
from dataflex_jax.data.pool import Group, Pool
from dataflex_jax.data.sampler import Sampler, SamplerState
from dataflex_jax.data.window import Sequences, Window
from dataflex_jax.policies.base import Order, Request, Signals
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.selection.choosing import Chooser, Chosen, Selecting, write_selection
from dataflex_jax.selection.order_scores import order_scores
from dataflex_jax.training.step import TrainState

FOLDER = "selections"
_STREAM = 2**32 - 2  # of the run's policy key, for selections; policies fold steps into it


class Ordering(NamedTuple):
    """An order at work: its name and when it decides, where no selector does."""

    name: str
    order: Order
    schedule: Schedule


class Selection:
    """The selector and the order of a run, and what of them survives a restart.

    Args:
        selecting: the selector; None: all rows of the pool.
        ordering: the order; None: seeded shuffles.
        pool: the candidates.
        groups: what the sampler draws from.
        sampler: draws plans.
        sequences: opened at the windows decided here.
        signals_of: the signals of a state's model.
        train_step: of the run.
        run_folder: selections are written into its subfolder.
    """

    def __init__(
        self,
        selecting: Selecting | None,
        ordering: Ordering | None,
        pool: Pool,
        groups: Sequence[Group],
        sampler: Sampler,
        sequences: Sequences,
        signals_of: Callable[[TrainState], Signals],
        train_step: int,
        run_folder: Path,
    ):
        self._selecting, self._ordering = selecting, ordering
        self._pool, self._groups, self._sampler, self._sequences = pool, groups, sampler, sequences
        self._signals_of, self._train_step, self._folder = signals_of, train_step, run_folder / FOLDER
        self._chooser = Chooser(selecting, pool, groups) if selecting else None
        self._begun = False
        self._window: Window | None = None
        self._state: dict[str, Any] = {}
        self._ever_chosen = np.zeros(pool.num_rows, bool)
        self._static_scores: np.ndarray | None = None

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        scores = {} if self._static_scores is None else {"scores": self._static_scores}
        return {
            "window": windows.to_arrays(self._window),
            "selector": self._state,
            "order": scores,
            "chosen": self._ever_chosen,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from what `arrays` gave."""
        self._begun = True
        self._state = saved.get("selector", {})
        self._ever_chosen = np.asarray(saved["chosen"], bool)
        self._static_scores = saved.get("order", {}).get("scores")
        self._open(windows.from_arrays(saved.get("window", {})))

    def forget_after(self, step: int) -> None:
        """Deletes the selections that a restart at `step` makes again."""
        for path in self._folder.glob("step_*.npz"):
            if int(path.stem.removeprefix("step_")) >= step:
                path.unlink()

    def between(self, step: int, state: TrainState, planned: SamplerState) -> dict[str, Any] | None:
        """Decides what there is to decide once `step` steps are done, before the next one is planned.

        Returns:
            The line for policy.jsonl; None where nothing was decided.

        Raises:
            InputError: a selector or an order that lacks what it needs.
        """
        started = time.perf_counter()
        if not self._begun:
            self._begin(state)
        if not self.due(step):
            return None
        record = self._decide(step, state, planned)
        return {"step": step, "seconds": time.perf_counter() - started, **record}

    def due(self, step: int) -> bool:
        """Whether a window is decided once `step` steps are done."""
        schedule = self._schedule()
        return schedule is not None and step < self._train_step and schedule.is_update(step)

    def _schedule(self) -> Schedule | None:
        if self._selecting is not None:
            return self._selecting.schedule
        return self._ordering.schedule if self._ordering and self._ordering.order.dynamic else None

    def _begin(self, state: TrainState) -> None:
        self._begun = True
        if self._selecting is not None and self._selecting.selector.init is not None:
            self._state = jax.tree.map(np.asarray, self._selecting.selector.init(self._signals_of(state)))
        if self._ordering is None or self._ordering.order.dynamic or self._ordering.order.scores.kind == "selector":
            return
        order = self._ordering.order
        self._static_scores = order_scores(order.scores, self._pool, self._signals_of(state))
        if self._selecting is None:
            everything = [np.arange(group.start, group.stop) for group in self._groups]
            starts = np.zeros(len(self._groups), np.int64)
            self._open(Window(0, starts, self._arranged(everything, self._static_scores, _key(state, 0)), True))

    def _decide(self, step: int, state: TrainState, planned: SamplerState) -> dict[str, Any]:
        schedule, selector_state, ever_chosen = self._schedule(), self._state, self._ever_chosen.copy()
        update = (step - schedule.warmup_step) // schedule.update_step
        key = _key(state, update + 1)
        counts = self._upcoming_rows(planned, schedule.update_step)
        signals = self._signals_of(state)
        record: dict[str, Any] = {"update": update, "pool": self._pool.num_rows}
        if self._selecting is None:
            drawn = zip(planned.cursors.tolist(), counts, strict=True)
            parts = [self._sequences.upcoming(g, start, n) for g, (start, n) in enumerate(drawn)]
            scores = np.full(self._pool.num_rows, np.nan, np.float32)
            ids = np.concatenate(parts)
            scores[ids] = order_scores(self._ordering.order.scores, self._pool, signals, ids)
            record |= {"policy": self._ordering.name, "selected": len(ids)}
        else:
            updates = sum(map(schedule.is_update, range(self._train_step)))
            request = Request(jnp.int32(update + 1), jnp.int32(updates), key)
            chosen, selector_state = self._chooser.choose(self._state, signals, request, counts)
            # A checkpoint's NumPy arrays can be read on any number of devices.
            selector_state = jax.tree.map(np.asarray, selector_state)
            parts, scores = [chosen.ids[part] for part in chosen.groups], chosen.all_scores
            ever_chosen[chosen.ids] = True
            record |= {"policy": self._selecting.name, **self._write(step, chosen), "coverage": ever_chosen.mean()}
        if self._ordering is None:
            self._state, self._ever_chosen = selector_state, ever_chosen
            self._open(Window(step, planned.cursors.copy(), tuple(parts), ordered=False))
            return record
        order = self._ordering.order
        if self._selecting is not None and order.scores.kind != "selector":
            scores = self._static_scores
            if scores is None:
                ids = np.unique(np.concatenate(parts))
                scores = np.full(self._pool.num_rows, np.nan, np.float32)
                scores[ids] = order_scores(order.scores, self._pool, signals, ids)
        self._state, self._ever_chosen = selector_state, ever_chosen
        arranged, repeats = self._arranged(parts, scores, key), self._selecting is not None
        self._open(Window(step, planned.cursors.copy(), arranged, ordered=True, repeats=repeats))
        return record | {"order": self._ordering.name}

    def _upcoming_rows(self, planned: SamplerState, steps: int) -> list[int]:
        """Rows that each group will give in the next steps, if no weights are published meanwhile; at least one."""
        later = planned
        for _ in range(steps):
            _, later = self._sampler.plan(later)
        return np.maximum(later.cursors - planned.cursors, 1).tolist()

    def _arranged(self, parts: Sequence[np.ndarray], scores: np.ndarray, key: jax.Array) -> tuple[np.ndarray, ...]:
        arrange = self._ordering.order.arrange
        keys = jax.random.split(key, len(parts))
        return tuple(ids[np.asarray(arrange(scores[ids], keys[g]))] for g, ids in enumerate(parts))

    def _open(self, window: Window | None) -> None:
        self._window = window
        self._sequences.open(window)

    def _write(self, step: int, chosen: Chosen) -> dict[str, Any]:
        """Writes the selection's file; returns its line's fields."""
        name = f"step_{step:08d}.npz"
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            write_selection(self._folder / name, self._pool, chosen, all_scores=self._selecting.save_all_scores)
        return {
            "selected": len(chosen.ids),
            "distinct": len(np.unique(chosen.ids)),
            "not_finite": chosen.not_finite,
            "score_min": chosen.scores.min(),
            "score_mean": chosen.scores.mean(dtype=np.float64),
            "score_max": chosen.scores.max(),
            "file": f"{FOLDER}/{name}",
        }


def _key(state: TrainState, update: int) -> jax.Array:
    # On the host's own devices, as all that selectors and orders compute.
    key = jax.random.wrap_key_data(jax.device_get(jax.random.key_data(state.key)))
    return jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(_STREAM)), update)
