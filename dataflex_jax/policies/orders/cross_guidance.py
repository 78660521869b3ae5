"""Cross guidance: sorted, but folded around the borders of equal sections."""

import numpy as np
from jaxtyping import Int

from dataflex_jax.policies.base import Order
from dataflex_jax.policies.common import pattern
from dataflex_jax.policies.registry import register_order

MODES = ("folding", "zigzag")


@register_order("cross_guidance")
def cross_guidance(
    *,
    sections: int = 2,
    ratio: float = 0.0,
    L: int = 2,
    mode: str = "folding",
    scores: str = "loss",
    dynamic: bool = False,
    ascending: bool = True,
    polarity: str = "higher_later",
    jitter: int = 0,
) -> Order:
    """The sorted ids, except that within `ratio * n` on either side of each border a pattern is applied locally.

    The `sections - 1` borders are equally spaced. Places are rounded to whole ids.

    Args:
        sections: number of sections.
        ratio: half the width of a border's surroundings as a share of all n ids, in [0, 1/(2 sections)).
        L: number of cycles of the local pattern.
        mode: the local pattern, "folding" or "zigzag".
        scores: what to go by: "loss" (of the current model), "selector" (the active selector's scores), "field:NAME"
            (of the record), or a .npy or .jsonl file of scores.
        dynamic: False: scores are computed once; True: anew at each update, for the rows until the next one.
        ascending: False: the other way round.
        polarity: "higher_later": high scores at the end; "higher_earlier": at the start.
        jitter: size of the consecutive windows that are shuffled afterwards; 0: none.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    pattern.check_cycles(L)
    if sections < 1:
        raise ValueError(f"sections = {sections}: must be >= 1")
    if not 0 <= 2 * ratio < 1 / sections:
        raise ValueError(f"ratio = {ratio}: must be in [0, {1 / (2 * sections):.4g}), so that no two borders meet")
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: must be one of {', '.join(MODES)}")

    def arrange(ids: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        arranged, end = ids.copy(), 0
        reach = round(len(ids) * ratio)
        for section in range(1, sections):
            border = round(len(ids) * section / sections)
            # Rounding can make the surroundings of two borders meet in a short list.
            start, end = max(end, border - reach), min(len(ids), border + reach)
            arranged[start:end] = pattern.folded(ids[start:end], L, zigzag=mode == "zigzag")
        return arranged

    return pattern.by_score(
        arrange, scores=scores, dynamic=dynamic, ascending=ascending, polarity=polarity, jitter=jitter
    )
