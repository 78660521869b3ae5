"""Zigzag: folding whose every other cycle runs backwards, so that scores never jump between cycles."""

from dataflex_jax.policies.base import Order
from dataflex_jax.policies.common import pattern
from dataflex_jax.policies.registry import register_order


@register_order("zigzag")
def zigzag(
    *,
    L: int = 5,
    scores: str = "loss",
    dynamic: bool = False,
    ascending: bool = True,
    polarity: str = "higher_later",
    jitter: int = 0,
) -> Order:
    """`s[0::L], reversed(s[1::L]), s[2::L], ...` of the sorted ids s.

    Args:
        L: number of cycles.
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
    return pattern.by_score(
        lambda ids, rng: pattern.folded(ids, L, zigzag=True),
        scores=scores,
        dynamic=dynamic,
        ascending=ascending,
        polarity=polarity,
        jitter=jitter,
    )
