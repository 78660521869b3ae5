"""The linear datamodeling score: how well sums of scores foretell the losses of models trained on subsets.

Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", arXiv 2303.14186, section 4.1.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy.stats import rankdata

LEVEL = 0.95  # of the intervals
RESAMPLES = 2000
RANDOM_SCORES = 1000
_BLOCK = 25  # of random scores at a time


class Interval(NamedTuple):
    """A figure with its interval at `LEVEL`."""

    value: float
    low: float
    high: float


class Lds(NamedTuple):
    """How well scores foretell losses.

    Attributes:
        overall: the mean over the target groups of their rank correlations.
        groups: the rank correlation of each.
        above_random: the share of random scores that foretell them less well.
    """

    overall: Interval
    groups: tuple[Interval, ...]
    above_random: float


def subsets(num_rows: int, count: int, alpha: float, seed: int) -> Int64[np.ndarray, "M n"]:
    """Random subsets of `round(alpha * num_rows)` rows, increasing; the first ones are the same for every `count`."""
    size = round(alpha * num_rows)
    drawn = (np.random.Generator(np.random.Philox(key=[seed, number])) for number in range(count))
    return np.stack([np.sort(random.permutation(num_rows)[:size]) for random in drawn])


def foretold(scores: Float64[np.ndarray, "N G"], members: Int64[np.ndarray, "M n"]) -> Float64[np.ndarray, "M G"]:
    """What scores say of each subset: the sum of its members'."""
    return np.stack([scores[ids].sum(axis=0) for ids in members])


def spearman(a: Float64[np.ndarray, "*B M G"], b: Float64[np.ndarray, "*B M G"]) -> Float64[np.ndarray, "*B G"]:
    """Rank correlations over the subsets, equal values having their mean rank; NaN where all of them are equal."""
    first, second = (rankdata(x, axis=-2) - (x.shape[-2] + 1) / 2 for x in (a, b))
    lengths = np.sqrt((first**2).sum(axis=-2) * (second**2).sum(axis=-2))
    with np.errstate(invalid="ignore"):
        return (first * second).sum(axis=-2) / np.where(lengths > 0, lengths, np.nan)


def random_lds(
    losses: Float64[np.ndarray, "M G"], members: Int64[np.ndarray, "M n"], num_rows: int, seed: int
) -> Float64[np.ndarray, " R"]:
    """What `RANDOM_SCORES` random scores, each one number a candidate, come to."""
    random = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    found = []
    for _ in range(0, RANDOM_SCORES, _BLOCK):
        sums = foretold(random.standard_normal((num_rows, _BLOCK)), members)
        found.append(spearman(sums.T[..., None], -losses[None]).mean(axis=-1))
    return np.concatenate(found)


def middle(values: Float64[np.ndarray, " R"]) -> Interval:
    """The mean of values and where the middle `LEVEL` of them are."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.nanmean(values)), float(low), float(high))


def lds(
    scores: Float64[np.ndarray, "N G"],
    losses: Float64[np.ndarray, "M G"],
    members: Int64[np.ndarray, "M n"],
    by_chance: Float64[np.ndarray, " R"],
    seed: int,
) -> Lds:
    """The mean over groups of Spearman(foretold, -loss), with percentile bootstrap intervals over the subsets.

    Args:
        scores: of the candidates for each group.
        losses: of the models on each group.
        members: the subsets that these were trained on.
        by_chance: `random_lds` of the same models.
        seed: of the resampling.
    """
    sums = foretold(scores, members)
    value = spearman(sums, -losses)
    resampled = np.random.Generator(np.random.Philox(key=[seed, 2**63 + 1])).integers(
        len(losses), size=(RESAMPLES, len(losses))
    )
    again = np.concatenate([spearman(sums[part], -losses[part]) for part in np.array_split(resampled, RESAMPLES // 50)])

    def interval(value: float, values: np.ndarray) -> Interval:
        return Interval(float(value), *middle(values)[1:])

    groups = tuple(interval(*each) for each in zip(value, again.T, strict=True))
    overall = interval(value.mean(), again.mean(axis=1))
    return Lds(overall, groups, float((by_chance < value.mean()).mean()))
