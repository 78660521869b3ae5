"""Segment: only the beginning and the end go by score, the rest is mixed."""

import numpy as np
from jaxtyping import Int

from dataflex_jax.policies import Order, options, register_order
from dataflex_jax.policies.common.pattern import ScoreOptions

TAILS = ("low", "high")


@register_order("segment")
@options.including(ScoreOptions)
def segment(
    shared: ScoreOptions,
    *,
    x_pct: float = 10.0,
    y_pct: float = 10.0,
    front: str = "low",
    back: str = "high",
) -> Order:
    """The first x% come from one tail of the sorted ids, the last y% from a tail, and the rest between.

    Each of the three parts is shuffled. Where both come from the same tail, its x + y percent are split at random.

    Args:
        shared: see `ScoreOptions`.
        x_pct: share of the front, in percent, rounded down to whole ids.
        y_pct: share of the back.
        front: tail of the front: "low" is the start of the sorted ids, "high" the end.
        back: tail of the back.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.between("x_pct", x_pct, 0, 100)
    options.between("y_pct", y_pct, 0, 100)
    options.require("y_pct", y_pct, x_pct + y_pct <= 100, f"at most 100 with x_pct = {x_pct} added")
    options.one_of("front", front, TAILS)
    options.one_of("back", back, TAILS)

    def arrange(ids: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        num_front, num_back = int(len(ids) * x_pct / 100), int(len(ids) * y_pct / 100)
        if front == back:
            both = num_front + num_back
            if front == "low":
                tail, middle = np.split(ids, [both])
            else:
                middle, tail = np.split(ids, [len(ids) - both])
            first, final = np.split(rng.permutation(tail), [num_front])
        elif front == "low":
            first, middle, final = np.split(ids, [num_front, len(ids) - num_back])
        else:
            final, middle, first = np.split(ids, [num_back, len(ids) - num_front])
        return np.concatenate([rng.permutation(part) for part in (first, middle, final)])

    return shared.order(arrange)
