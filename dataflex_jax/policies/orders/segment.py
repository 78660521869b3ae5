"""Segment: only the beginning and the end go by score, the rest is mixed."""

import numpy as np
from jaxtyping import Int

from dataflex_jax.policies.base import Order
from dataflex_jax.policies.common import pattern
from dataflex_jax.policies.registry import register_order

TAILS = ("low", "high")


@register_order("segment")
def segment(
    *,
    x_pct: float = 10.0,
    y_pct: float = 10.0,
    front: str = "low",
    back: str = "high",
    scores: str = "loss",
    dynamic: bool = False,
    ascending: bool = True,
    polarity: str = "higher_later",
    jitter: int = 0,
) -> Order:
    """The first x% come from one tail of the sorted ids, the last y% from a tail, and the rest between.

    Each of the three parts is shuffled. Where both come from the same tail, its x + y percent are split at random.

    Args:
        x_pct: share of the front, in percent, rounded down to whole ids.
        y_pct: share of the back.
        front: tail of the front: "low" is the start of the sorted ids, "high" the end.
        back: tail of the back.
        scores: what to go by: "loss" (of the current model), "selector" (the active selector's scores), "field:NAME"
            (of the record), or a .npy or .jsonl file of scores.
        dynamic: False: scores are computed once; True: anew at each update, for the rows until the next one.
        ascending: False: the other way round.
        polarity: "higher_later": high scores at the end; "higher_earlier": at the start.
        jitter: size of the consecutive windows that are shuffled afterwards; 0: none.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    for name, share in (("x_pct", x_pct), ("y_pct", y_pct)):
        if not 0 <= share <= 100:
            raise ValueError(f"{name} = {share}: must be in [0, 100]")
    if x_pct + y_pct > 100:
        raise ValueError(f"y_pct = {y_pct}: x_pct + y_pct must be at most 100, is {x_pct + y_pct}")
    for name, tail in (("front", front), ("back", back)):
        if tail not in TAILS:
            raise ValueError(f"{name} = {tail!r}: must be one of {', '.join(TAILS)}")

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

    return pattern.by_score(
        arrange, scores=scores, dynamic=dynamic, ascending=ascending, polarity=polarity, jitter=jitter
    )
