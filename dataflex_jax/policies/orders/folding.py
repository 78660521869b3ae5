"""Folding: several passes from low scores to high ones, instead of one."""

from dataflex_jax.policies import Order, options, register_order
from dataflex_jax.policies.common.pattern import ScoreOptions, folded


@register_order("folding")
@options.including(ScoreOptions)
def folding(shared: ScoreOptions, *, L: int = 5) -> Order:
    """Cuts the sorted ids s into L interleaved cycles, one after the other: `s[0::L], s[1::L], ..., s[L-1::L]`.

    Args:
        shared: see `ScoreOptions`.
        L: number of cycles.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("L", L, 1)
    return shared.order(lambda ids, rng: folded(ids, L, zigzag=False))
