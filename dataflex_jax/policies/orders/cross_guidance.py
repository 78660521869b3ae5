"""Cross guidance: sorted, but folded around the borders of equal sections."""

import numpy as np
from jaxtyping import Int

from dataflex_jax.policies import Order, options, register_order
from dataflex_jax.policies.common.pattern import ScoreOptions, folded

MODES = ("folding", "zigzag")


@register_order("cross_guidance")
@options.including(ScoreOptions)
def cross_guidance(
    shared: ScoreOptions,
    *,
    sections: int = 2,
    ratio: float = 0.0,
    L: int = 2,
    mode: str = "folding",
) -> Order:
    """The sorted ids, except that within `ratio * n` on either side of each border a pattern is applied locally.

    The `sections - 1` borders are equally spaced. Places are rounded to whole ids.

    Args:
        shared: see `ScoreOptions`.
        sections: number of sections.
        ratio: half the width of a border's surroundings as a share of all n ids, in [0, 1/(2 sections)).
        L: number of cycles of the local pattern.
        mode: the local pattern, "folding" or "zigzag".

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("L", L, 1)
    options.between("sections", sections, 1, 2**20)
    apart = f"in [0, {1 / (2 * sections):.4g}), so that no two borders meet"
    options.require("ratio", ratio, 0 <= 2 * ratio < 1 / sections, apart)
    options.one_of("mode", mode, MODES)

    def arrange(ids: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        arranged, end = ids.copy(), 0
        reach = round(len(ids) * ratio)
        for section in range(1, sections):
            border = round(len(ids) * section / sections)
            # Rounding can make the surroundings of two borders meet in a short list.
            start, end = max(end, border - reach), min(len(ids), border + reach)
            arranged[start:end] = folded(ids[start:end], L, zigzag=mode == "zigzag")
        return arranged

    return shared.order(arrange)
