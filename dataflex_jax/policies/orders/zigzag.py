"""Zigzag: folding whose every other cycle runs backwards, so that scores never jump between cycles."""

from dataflex_jax.policies import Order, options, register_order
from dataflex_jax.policies.common.pattern import ScoreOptions, folded


@register_order("zigzag")
@options.including(ScoreOptions)
def zigzag(shared: ScoreOptions, *, L: int = 5) -> Order:
    """`s[0::L], reversed(s[1::L]), s[2::L], ...` of the sorted ids s.

    Args:
        shared: see `ScoreOptions`.
        L: number of cycles.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("L", L, 1)
    return shared.order(lambda ids, rng: folded(ids, L, zigzag=True))
