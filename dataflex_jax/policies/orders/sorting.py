"""Sorted by score: the plain curriculum.

Bengio et al. 2009, "Curriculum Learning".
"""

from dataflex_jax.policies import Order, options, register_order
from dataflex_jax.policies.common.pattern import ScoreOptions


@register_order("sorting")
@options.including(ScoreOptions)
def sorting(shared: ScoreOptions) -> Order:
    """Low scores first, high scores last; see `ScoreOptions`."""
    return shared.order(lambda ids, rng: ids)
