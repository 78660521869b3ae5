"""What all orders share: sorting by score, the direction of it, jitter, and rows without a score."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from dataflex_jax.policies import options
from dataflex_jax.policies.base import Order, ScoreSource

POLARITIES = ("higher_later", "higher_earlier")

# (ids in order of their scores, randomness) -> the same ids rearranged
Pattern = Callable[[Int[np.ndarray, " n"], np.random.Generator], Int[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The hyperparameters of every order by score.

    Attributes:
        scores: what to go by: "loss" (of the current model), "selector" (the active selector's scores), "field:NAME"
            (of the record), or a .npy or .jsonl file of scores.
        dynamic: False: scores are computed once; True: anew at each update, for the rows until the next one.
        ascending: whether to sort towards the end that `polarity` names; False: the other way round.
        polarity: "higher_later": high scores at the end; "higher_earlier": at the start.
        jitter: size of the consecutive windows that are shuffled after the pattern; 0 or 1: none are.

    Raises:
        ValueError: a hyperparameter out of its range.
    """

    scores: str = "loss"
    dynamic: bool = False
    ascending: bool = True
    polarity: str = "higher_later"
    jitter: int = 0

    def __post_init__(self):
        given = isinstance(self.scores, str) and self.scores.strip() != ""
        options.require("scores", self.scores, given, "'loss', 'selector', 'field:NAME' or a .npy or .jsonl file")
        options.one_of("polarity", self.polarity, POLARITIES)
        options.at_least("jitter", self.jitter, 0)

    def order(self, pattern: Pattern) -> Order:
        """The order that applies a pattern, a permutation, to the ids sorted by score.

        Ids with equal scores are sorted in incoming order; the descending sort is the ascending one reversed. Ids whose
        score is NaN are left out of the pattern and come last, in incoming order.
        """
        reverse = self.ascending == (self.polarity == "higher_earlier")

        def arrange(values: Float[np.ndarray, " n"], key: PRNGKeyArray) -> Int[np.ndarray, " n"]:
            values = np.asarray(values)
            rng = generator(key)
            last = np.isnan(values)
            scored = np.flatnonzero(~last)
            ids = scored[np.argsort(values[scored], kind="stable")]
            arranged = pattern(ids[::-1] if reverse else ids, rng)
            return np.concatenate([jittered(arranged, self.jitter, rng), np.flatnonzero(last)])

        return Order(arrange, ScoreSource.parse(self.scores), self.dynamic)


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
