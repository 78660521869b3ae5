"""Which row of its group each draw of the sampler is.

Without a window a group's rows come in seeded shuffles, a new one each epoch. A selector or an order puts a window in
their place: the chosen ids in the order of training, from the group's present cursor on. Used up, it begins again: the
chosen in a new shuffle, the ordered in their order; what only rearranges the rows that come anyway ends instead. Of a
choice of more rows than there are, each comes once before any comes again.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from dataflex_jax.data.pool import Group
from dataflex_jax.data.sampler import Plan


class Window(NamedTuple):
    """What the groups draw from until the next update.

    Attributes:
        step: optimizer steps done when it was decided.
        starts: each group's cursor where the window begins, int64 [G].
        ids: each group's rows, int64.
        ordered: whether they come as they are; otherwise in seeded shuffles.
        repeats: whether it begins again when it is used up; otherwise the rows come that come without a window.
        once: how many of each group's rows are shuffled together, the rest in passes of as many; None: all.
    """

    step: int
    starts: Int64[np.ndarray, " G"]
    ids: tuple[Int64[np.ndarray, " n"], ...]
    ordered: bool
    repeats: bool = True
    once: tuple[int, ...] | None = None


def passes(ids: Int64[np.ndarray, " n"], once: int) -> list[Int64[np.ndarray, " m"]]:
    """`ids` in parts of `once`, the last of which may be shorter; at least one part."""
    return [ids[start : start + once] for start in range(0, len(ids), once)] or [ids]


def to_arrays(window: Window | None) -> dict[str, Any]:
    """The window for a checkpoint."""
    if window is None:
        return {}
    return {
        "step": np.int64(window.step),
        "starts": window.starts,
        "ordered": np.int64(window.ordered),
        "repeats": np.int64(window.repeats),
        **({} if window.once is None else {"once": np.asarray(window.once, np.int64)}),
        "ids": {str(group): ids for group, ids in enumerate(window.ids)},
    }


def from_arrays(saved: dict[str, Any]) -> Window | None:
    """The window that `to_arrays` was given."""
    if not saved:
        return None
    ids = tuple(np.asarray(saved["ids"][str(group)], np.int64) for group in range(len(saved["ids"])))
    starts = np.asarray(saved["starts"], np.int64)
    once = tuple(np.asarray(saved["once"]).tolist()) if "once" in saved else None
    return Window(int(saved["step"]), starts, ids, bool(saved["ordered"]), bool(saved["repeats"]), once)


def shuffled_epochs(source: Sequence[int], name: str, seed: int) -> grain.MapDataset:
    """A group's endless sequence: seeded shuffle, a new one each epoch; it does not depend on the other groups."""
    return grain.MapDataset.source(source).seed((seed + zlib.crc32(name.encode())) % 2**32).shuffle().repeat()


class Passes:
    """An endless sequence over some ids: seeded shuffles of one part of them after the other, new ones every time.

    Args:
        parts: of the ids; see `passes`.
        name: of all shuffles.
        seed: of all shuffles.
    """

    def __init__(self, parts: Sequence[Int64[np.ndarray, " m"]], name: str, seed: int):
        names = [name, *(f"{name}/{number}" for number in range(1, len(parts)))]
        self._lengths = [len(part) for part in parts]
        self._parts = [shuffled_epochs(part, of_part, seed) for part, of_part in zip(parts, names, strict=True)]

    def __getitem__(self, place: int) -> int:
        round_, place = divmod(place, sum(self._lengths))
        number, place = divmod(place, self._lengths[0])
        return self._parts[number][round_ * self._lengths[number] + place]


class Sequences:
    """From the positions of a plan to rows of the pool.

    Args:
        groups: the groups that the sampler draws from.
        seed: of all shuffles.
    """

    def __init__(self, groups: Sequence[Group], seed: int):
        self._groups, self._seed = groups, seed
        self._epochs = [shuffled_epochs(range(group.start, group.stop), group.name, seed) for group in groups]
        self._window: Window | None = None
        self._chosen: list[grain.MapDataset | Passes] = []

    def open(self, window: Window | None) -> None:
        """Draws from `window` from now on; None: from all rows."""
        self._window, self._chosen = window, self._endless(window) if window else []

    def beginning(self, window: Window, counts: Sequence[int]) -> list[Int64[np.ndarray, " n"]]:
        """The first rows, `counts[g]` of each group g, that would come if `window` were opened."""
        drawn = zip(self._endless(window), counts, strict=True)
        return [np.array([sequence[place] for place in range(count)], np.int64) for sequence, count in drawn]

    def _endless(self, window: Window) -> list[grain.MapDataset | Passes]:
        """Each group's sequence of chosen rows."""
        chosen = []
        for number, ids in enumerate(window.ids):
            if window.ordered:
                chosen.append(grain.MapDataset.source(ids).repeat())
            else:
                parts = passes(ids, window.once[number] if window.once else len(ids))
                chosen.append(Passes(parts, f"{self._groups[number].name}/{window.step}", self._seed))
        return chosen

    def ids(self, plan: Plan) -> Int64[np.ndarray, " B"]:
        """The row of each draw."""
        return np.array(
            [self.id(group, position) for group, position in zip(plan.domains, plan.positions, strict=True)], np.int64
        )

    def id(self, group: int, position: int) -> int:
        """The row at a position of a group's sequence."""
        if self._window is not None:
            place = int(position - self._window.starts[group])
            if self._window.repeats or place < len(self._window.ids[group]):
                return int(self._chosen[group][place])
        return int(self._epochs[group][int(position)])

    def upcoming(self, group: int, start: int, count: int) -> Int64[np.ndarray, " n"]:
        """The `count` rows that come from a cursor on, or more: all that a window which does not repeat still has.

        So what only rearranges them neither loses nor repeats one, however many were drawn from the window before.
        """
        rest = 0
        if self._window is not None and not self._window.repeats:
            rest = int(self._window.starts[group]) + len(self._window.ids[group]) - start
        return np.array([self.id(group, position) for position in range(start, start + max(count, rest))], np.int64)
