"""Between two steps: a selector chooses the next window's examples, an order arranges them.

With a mixer, its weights say how many rows of each domain the window has, and selection is inside each domain. Without
one, selection is over the whole pool. As a filter (`keep`) a selector chooses a share of each domain, or of the pool,
to draw from instead.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from dataflex_jax.data import window as windows
from dataflex_jax.data.pool import Group, Pool
from dataflex_jax.data.sampler import Sampler, SamplerState
from dataflex_jax.data.window import Sequences, Window
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.base import Request
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.policies.signals import Signals
from dataflex_jax.selection.choosing import Chooser, Chosen, described, share_of, write_selection
from dataflex_jax.selection.extremes import Decode, write_extremes
from dataflex_jax.selection.order_scores import order_scores

FOLDER = "selections"
_STREAM = 2**32 - 2  # of the run's policy key, for selections; policies fold steps into it

Ask = Callable[[], Signals]


class Draws(NamedTuple):
    """Where rows come from.

    Attributes:
        pool: the candidates.
        groups: parts of the pool that the sampler draws from.
        sampler: draws plans.
        sequences: turns plans into rows; opened at the windows that are decided here.
    """

    pool: Pool
    groups: Sequence[Group]
    sampler: Sampler
    sequences: Sequences


class Selection:
    """The selector and the order of a run, and what of them survives a restart.

    Args:
        policies: of the run; without a selector all rows of the pool are taken, without an order they are shuffled.
        draws: where rows come from.
        train_step: of the run.
        run_folder: selections are written into its subfolder.
        decode: the text of token ids, to write what was scored highest and lowest; None: it is not written.
    """

    def __init__(
        self, policies: ActivePolicies, draws: Draws, train_step: int, run_folder: Path, decode: Decode | None = None
    ):
        self._selector, self._order = policies.selector, policies.order
        self._keep, self._save_all_scores = policies.keep, policies.save_all_scores
        self._draws, self._train_step, self._folder = draws, train_step, run_folder / FOLDER
        self._decode = decode
        self._chooser = Chooser(self._selector, draws.pool, draws.groups) if self._selector else None
        self._begun = False
        self._window: Window | None = None
        self._state: dict[str, Any] = {}
        self._ever_chosen = np.zeros(draws.pool.num_rows, bool)
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
        for path in (*self._folder.glob("step_*.npz"), *self._folder.glob("step_*.jsonl")):
            if (number := path.stem.removeprefix("step_")).isdecimal() and int(number) >= step:
                path.unlink()

    def due(self, step: int) -> bool:
        """Whether a window is decided once `step` steps are done."""
        schedule = self._schedule()
        return schedule is not None and step < self._train_step and schedule.is_update(step)

    def between(self, step: int, planned: SamplerState, key: PRNGKeyArray, ask: Ask) -> dict[str, Any] | None:
        """Decides what there is to decide once `step` steps are done, before the next one is planned.

        Args:
            step: steps done.
            planned: where the sampler stands.
            key: the run's policy key.
            ask: the signals of the model as it is; called only where something is asked.

        Returns:
            The line for policy.jsonl; None where nothing was decided.

        Raises:
            InputError: a selector or an order that lacks what it needs.
        """
        started = time.perf_counter()
        if not self._begun:
            self._begin(key, ask)
        if not self.due(step):
            return None
        record = self._decide(step, planned, key, ask())
        return {"step": step, "seconds": time.perf_counter() - started, **record}

    def _schedule(self) -> Schedule | None:
        if self._selector is not None:
            return self._selector.schedule
        return self._order.schedule if self._order and self._order.policy.dynamic else None

    def _begin(self, key: PRNGKeyArray, ask: Ask) -> None:
        self._begun = True
        if self._selector is not None and self._selector.policy.init is not None:
            self._state = jax.tree.map(np.asarray, self._selector.policy.init(ask()))
        if self._order is None or self._order.policy.dynamic or self._order.policy.scores.kind == "selector":
            return
        self._static_scores = order_scores(self._order.policy.scores, self._draws.pool, ask())
        if self._selector is None:
            groups = self._draws.groups
            everything = [np.arange(group.start, group.stop) for group in groups]
            starts = np.zeros(len(groups), np.int64)
            arranged = self._arranged(everything, self._static_scores, _key(key, 0))
            self._open(Window(0, starts, arranged, ordered=True))

    def _decide(self, step: int, planned: SamplerState, key: PRNGKeyArray, signals: Signals) -> dict[str, Any]:
        schedule, pool = self._schedule(), self._draws.pool
        update = (step - schedule.warmup_step) // schedule.update_step
        # "Once" is an update_step that no run reaches: of what it would choose, no more is drawn than a whole run.
        steps = min(schedule.update_step, self._train_step)
        key, counts = _key(key, update + 1), self._upcoming_rows(planned, steps)
        record: dict[str, Any] = {"update": update, "pool": pool.num_rows}
        once = None
        if self._selector is None:
            parts, scores = self._rearranged(planned, counts, signals)
            decided = {"policy": self._order.name, "selected": sum(map(len, parts))}
        else:
            updates = sum(map(schedule.is_update, range(self._train_step)))
            request = Request(jnp.int32(update + 1), jnp.int32(updates), key)
            chosen, state = self._chosen(signals, request, counts)
            parts, scores = [chosen.ids[part] for part in chosen.groups], chosen.all_scores
            if planned.version > 1:
                once = chosen.once
            if self._keep is not None and self._order is not None:
                # What is arranged are the rows that come until the next update, of those that are kept.
                kept = Window(step, planned.cursors, tuple(parts), ordered=False)
                parts = self._draws.sequences.beginning(kept, counts)
            before = None if self._window is None else np.concatenate(self._window.ids)
            facts = described(chosen, pool, before)
            decided = {"policy": self._selector.name, **facts, "file": self._write(step, chosen)}
            if self._order is not None and self._order.policy.scores.kind != "selector":
                scores = self._scores_of(np.unique(np.concatenate(parts)), signals)
            # Last, so that what interrupts the sweeps leaves the state of before.
            # A checkpoint's NumPy arrays can be read on any number of devices.
            self._state = jax.tree.map(np.asarray, state)
            self._ever_chosen[chosen.ids] = True
            decided["coverage"] = self._ever_chosen.mean()
        if self._order is None:
            self._open(Window(step, planned.cursors.copy(), tuple(parts), ordered=False, once=once))
            return record | decided
        arranged, repeats = self._arranged(parts, scores, key, once), self._selector is not None
        self._open(Window(step, planned.cursors.copy(), arranged, ordered=True, repeats=repeats))
        return record | decided | {"order": self._order.name}

    def _chosen(self, signals: Signals, request: Request, counts: Sequence[int]) -> tuple[Chosen, dict[str, Any]]:
        """The selector's choice of the rows that come, or of those that are kept to draw from; its state after it."""
        if self._keep is None:
            return self._chooser.choose(self._state, signals, request, counts)
        shares = [share_of(self._keep, group.size) for group in self._draws.groups]
        return self._chooser.choose(self._state, signals, request, shares, again=False)

    def _rearranged(
        self, planned: SamplerState, counts: Sequence[int], signals: Signals
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """(the rows that come anyway, group by group; scores of all candidates, NaN elsewhere)."""
        drawn = zip(planned.cursors.tolist(), counts, strict=True)
        parts = [self._draws.sequences.upcoming(g, start, n) for g, (start, n) in enumerate(drawn)]
        return parts, self._scores_of(np.concatenate(parts), signals)

    def _scores_of(self, ids: np.ndarray, signals: Signals) -> np.ndarray:
        """What the order goes by, of all candidates; NaN for those not in `ids`, where scores are taken anew."""
        if self._static_scores is not None:
            return self._static_scores
        scores = np.full(self._draws.pool.num_rows, np.nan, np.float32)
        scores[ids] = order_scores(self._order.policy.scores, self._draws.pool, signals, ids)
        return scores

    def _upcoming_rows(self, planned: SamplerState, steps: int) -> list[int]:
        """Rows that each group will give in the next steps, if no weights are published meanwhile; at least one."""
        later = planned
        for _ in range(steps):
            _, later = self._draws.sampler.plan(later)
        return np.maximum(later.cursors - planned.cursors, 1).tolist()

    def _arranged(
        self, parts: Sequence[np.ndarray], scores: np.ndarray, key: jax.Array, once: Sequence[int] | None = None
    ) -> tuple[np.ndarray, ...]:
        """Each group's part in order; where `once` says how many are distinct, one pass over these after the other."""
        arrange, keys, arranged = self._order.policy.arrange, jax.random.split(key, len(parts)), []
        for g, part in enumerate(parts):
            passes = windows.passes(part, once[g] if once else len(part))
            pass_keys = [keys[g], *(jax.random.fold_in(keys[g], number) for number in range(1, len(passes)))]
            ordered = [ids[np.asarray(arrange(scores[ids], k))] for ids, k in zip(passes, pass_keys, strict=True)]
            arranged.append(np.concatenate(ordered))
        return tuple(arranged)

    def _open(self, window: Window | None) -> None:
        self._window = window
        self._draws.sequences.open(window)

    def _write(self, step: int, chosen: Chosen) -> str:
        """Writes the selection's file; returns its path in the run folder."""
        name = f"step_{step:08d}.npz"
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            path = self._folder / name
            if self._decode is not None:
                write_extremes(path.with_suffix(".jsonl"), self._draws.pool, chosen, self._decode)
            write_selection(path, self._draws.pool, chosen, all_scores=self._save_all_scores)
        return f"{FOLDER}/{name}"


def _key(key: PRNGKeyArray, update: int) -> jax.Array:
    # On the host's own devices, as all that selectors and orders compute.
    key = jax.random.wrap_key_data(jax.device_get(jax.random.key_data(key)))
    return jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(_STREAM)), update)
