"""What all orders share: sorting by score, the direction of it, jitter, and rows without a score."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from dataflex_jax.policies.base import Order

POLARITIES = ("higher_later", "higher_earlier")

# (ids in order of their scores, randomness) -> the same ids rearranged
Pattern = Callable[[Int[np.ndarray, " n"], np.random.Generator], Int[np.ndarray, " n"]]


def by_score(pattern: Pattern, *, scores: str, dynamic: bool, ascending: bool, polarity: str, jitter: int) -> Order:
    """The order that applies a pattern to the ids sorted by score.

    Ids with equal scores are sorted in incoming order; the descending sort is the ascending one reversed. Ids whose
    score is NaN are left out of the pattern and come last, in incoming order.

    Args:
        pattern: a permutation of sorted ids.
        scores: what to go by; see `Order`.
        dynamic: whether scores are computed anew at each update.
        ascending: whether to sort towards the end that `polarity` names.
        polarity: "higher_later": high scores at the end; "higher_earlier": at the start.
        jitter: size of the consecutive windows that are shuffled after the pattern; 0 or 1: none are.

    Raises:
        ValueError: an empty `scores`, an unknown polarity or a negative jitter.
    """
    if not isinstance(scores, str) or not scores.strip():
        raise ValueError(f"scores = {scores!r}: must be 'loss', 'selector', 'field:NAME' or a .npy or .jsonl file")
    if polarity not in POLARITIES:
        raise ValueError(f"polarity = {polarity!r}: must be one of {', '.join(POLARITIES)}")
    if jitter < 0:
        raise ValueError(f"jitter = {jitter}: must be >= 0")
    reverse = ascending == (polarity == "higher_earlier")

    def arrange(values: Float[np.ndarray, " n"], key: PRNGKeyArray) -> Int[np.ndarray, " n"]:
        values = np.asarray(values)
        rng = generator(key)
        last = np.isnan(values)
        scored = np.flatnonzero(~last)
        ids = scored[np.argsort(values[scored], kind="stable")]
        arranged = pattern(ids[::-1] if reverse else ids, rng)
        return np.concatenate([jittered(arranged, jitter, rng), np.flatnonzero(last)])

    return Order(arrange=arrange, scores=scores, dynamic=dynamic)


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """Randomness on the host that is a function of a JAX key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def jittered(ids: Int[np.ndarray, " n"], window: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Shuffles inside consecutive windows, the last of which may be shorter."""
    if window <= 1:
        return ids
    return ids[np.lexsort((rng.random(len(ids)), np.arange(len(ids)) // window))]


def folded(ids: Int[np.ndarray, " n"], cycles: int, *, zigzag: bool) -> Int[np.ndarray, " n"]:
    """Every `cycles`-th id from the first on, then from the second on, and so on; zigzag reverses the odd cycles."""
    parts = [ids[start::cycles] for start in range(min(cycles, len(ids)))]
    if zigzag:
        parts[1::2] = [part[::-1] for part in parts[1::2]]
    return np.concatenate([ids[:0], *parts])


def check_cycles(cycles: int) -> None:
    """Refuses a number of cycles `L` below 1.

    Raises:
        ValueError: names the hyperparameter.
    """
    if cycles < 1:
        raise ValueError(f"L = {cycles}: must be >= 1")
