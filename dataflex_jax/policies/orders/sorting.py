"""Sorted by score: the plain curriculum.

Bengio et al. 2009, "Curriculum Learning".
"""

from dataflex_jax.policies.base import Order
from dataflex_jax.policies.common import pattern
from dataflex_jax.policies.registry import register_order


@register_order("sorting")
def sorting(
    *,
    scores: str = "loss",
    dynamic: bool = False,
    ascending: bool = True,
    polarity: str = "higher_later",
    jitter: int = 0,
) -> Order:
    """Low scores first, high scores last.

    Args:
        scores: what to go by: "loss" (of the current model), "selector" (the active selector's scores), "field:NAME"
            (of the record), or a .npy or .jsonl file of scores.
        dynamic: False: scores are computed once; True: anew at each update, for the rows until the next one.
        ascending: False: the other way round.
        polarity: "higher_later": high scores at the end; "higher_earlier": at the start.
        jitter: size of the consecutive windows that are shuffled afterwards; 0: none.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    return pattern.by_score(
        lambda ids, rng: ids, scores=scores, dynamic=dynamic, ascending=ascending, polarity=polarity, jitter=jitter
    )
