"""How sure a figure over seeds is: means, standard deviations and 95 % intervals of differences."""

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


class Difference(NamedTuple):
    """A difference of means.

    Attributes:
        mean: the difference.
        low: the lower end of its interval; None where there are too few values for one.
        high: the upper end.
        pairs: of how many pairs it is; 0: the values are not paired.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below 0; otherwise, and without an interval, 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def spread(values: np.ndarray) -> tuple[float, float | None]:
    """The mean, and the standard deviation of the sample (n - 1); None of one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]) -> Difference:
    """How much larger the mean of `ours` is, with a 95 % interval.

    With two seeds or more in both it is of these alone, and the interval Student's of the differences; else Welch's.

    Args:
        ours: values by seed; those that are not to be paired have keys of their own.
        theirs: what they are compared with.
    """
    both = [seed for seed in ours if seed in theirs]
    if len(both) > 1:
        mean, sd = spread(np.array([ours[seed] - theirs[seed] for seed in both]))
        half = _quantile(len(both) - 1) * sd / math.sqrt(len(both))
        return Difference(mean, mean - half, mean + half, len(both))
    samples = [np.array(list(values.values())) for values in (ours, theirs)]
    mean = float(samples[0].mean() - samples[1].mean())
    if min(map(len, samples)) < 2:
        return Difference(mean, None, None, 0)
    errors = [float(sample.var(ddof=1)) / len(sample) for sample in samples]
    total = sum(errors)
    if total == 0:
        return Difference(mean, mean, mean, 0)
    freedom = total**2 / sum(error**2 / (len(sample) - 1) for error, sample in zip(errors, samples, strict=True))
    half = _quantile(freedom) * math.sqrt(total)
    return Difference(mean, mean - half, mean + half, 0)


def _quantile(freedom: float) -> float:
    """How many standard errors the interval reaches to either side."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2))
