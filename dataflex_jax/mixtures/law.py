"""The log-linear law of mixtures: a metric of a model as a function of the mixture that it was trained on.

    y_m(w) = c_m + exp(A_m . w)

fitted by the Huber loss, with cross-validation (Olmix, arXiv 2602.12237, section 3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from scipy.stats import rankdata
from scipy.stats import t as student

from dataflex_jax.errors import InputError

DELTA = 0.02  # of the Huber loss
FOLDS = 5
_STARTS = (0.01, 0.1, 0.5, 2.0, 10.0)  # how far below the lowest value c begins, in ranges of the values
STEEPEST = 20.0  # |A|: further, no run says how far, and exponentials overflow
_MOST_STEPS = 300
_LEVEL = 0.001  # that a rank correlation is by chance


class Law(NamedTuple):
    """A law for each of M metrics.

    Attributes:
        floors: c.
        slopes: A.
    """

    floors: Float64[np.ndarray, " M"]
    slopes: Float64[np.ndarray, "M K"]

    def at(self, weights: Float64[np.ndarray, "*B K"]) -> Float64[np.ndarray, "*B M"]:
        """The metrics at mixtures."""
        return self.floors + np.exp(weights @ self.slopes.T)

    def sensitivity(self, weights: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "M K"]:
        """How fast each metric changes where a domain's weight grows and the others shrink in proportion."""
        exponents = self.slopes @ weights
        return np.exp(exponents)[:, None] * (self.slopes - exponents[:, None])


class Checked(NamedTuple):
    """How well laws predict runs that they were not fitted to.

    Attributes:
        predicted: of each run, by the law of the other folds.
        r2: the share of the variance that is predicted; 0 or less: no better than the mean.
        spearman: the rank correlation.
        foretells: whether a law is better than the mean; of no metric where none has a rank correlation above chance.
    """

    predicted: Float64[np.ndarray, "S M"]
    r2: Float64[np.ndarray, " M"]
    spearman: Float64[np.ndarray, " M"]
    foretells: Bool[np.ndarray, " M"]


def check_values(names: Sequence[str], values: Float64[np.ndarray, "S M"]) -> None:
    """Refuses what no law can be fitted to.

    Raises:
        InputError: a metric that is the same in all runs.
    """
    if same := [name for name, of_runs in zip(names, values.T, strict=True) if np.ptp(of_runs) == 0]:
        raise InputError(f"metric {same[0]!r} is the same in all {len(values)} runs; leave it out with --fit")


def fit(weights: Float64[np.ndarray, "S K"], values: Float64[np.ndarray, "S M"]) -> Law:
    """The laws with the smallest Huber loss that several starts lead to.

    Args:
        weights: of the runs.
        values: of their metrics.
    """
    floors, slopes = _fitted(weights, values, np.ones((1, len(weights)), bool))
    return Law(floors[0], slopes[0])


def cross_validated(weights: Float64[np.ndarray, "S K"], values: Float64[np.ndarray, "S M"], seed: int) -> Checked:
    """What the law of the other folds says of each of `FOLDS` random folds.

    Args:
        weights: of the runs.
        values: of their metrics.
        seed: of the folds.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 2**62])).permutation(len(weights))
    fold_of = np.empty(len(weights), np.int64)
    fold_of[order] = np.arange(len(weights)) % FOLDS
    laws = _fitted(weights, values, fold_of != np.arange(FOLDS)[:, None])
    predicted = np.empty_like(values)
    for fold, of_fold in enumerate(zip(*laws, strict=True)):
        predicted[fold_of == fold] = Law(*of_fold).at(weights[fold_of == fold])
    r2 = 1 - ((values - predicted) ** 2).sum(axis=0) / ((values - values.mean(axis=0)) ** 2).sum(axis=0)
    ranks = np.array([_rank_correlation(*pair) for pair in zip(predicted.T, values.T, strict=True)])
    # A law that is weak counts where another one is strong: without it the metric's own domain would be starved.
    better = r2 > 0
    return Checked(predicted, r2, ranks, better & (better & (ranks > by_chance(len(weights)))).any())


def by_chance(runs: int) -> float:
    """The rank correlation over `runs` runs that chance surpasses once in a thousand times."""
    quantile = student.ppf(1 - _LEVEL, runs - 2)
    return float(quantile / np.sqrt(runs - 2 + quantile**2))


def _fitted(
    weights: Float64[np.ndarray, "S K"], values: Float64[np.ndarray, "S M"], used: Bool[np.ndarray, "F S"]
) -> tuple[Float64[np.ndarray, "F M"], Float64[np.ndarray, "F M K"]]:
    """The laws of the runs that each of F sets uses: all sets, metrics and starts side by side."""
    (sets, _), metrics = used.shape, values.shape[1]
    shape = (sets, metrics, len(_STARTS))
    points = np.array([[[_start(weights[of], y[of], share) for share in _STARTS] for y in values.T] for of in used])
    of_problem = np.broadcast_to(used[:, None, None], (*shape, len(weights))).reshape(-1, len(weights))
    targets = np.broadcast_to(values.T[None, :, None], (*shape, len(weights))).reshape(-1, len(weights))
    points, losses = _descended(points.reshape(-1, points.shape[-1]), weights, targets, of_problem.astype(np.float64))
    best = losses.reshape(shape).argmin(axis=-1)
    chosen = np.take_along_axis(points.reshape(*shape, -1), best[..., None, None], axis=2)[:, :, 0]
    return chosen[..., 0], chosen[..., 1:]


def _start(weights: Float64[np.ndarray, "S K"], values: Float64[np.ndarray, " S"], share: float) -> np.ndarray:
    """c below the lowest value by a share of their range, and A by least squares of the logarithms."""
    floor = values.min() - share * max(np.ptp(values), 1e-6)
    slopes = np.linalg.lstsq(weights, np.log(values - floor), rcond=None)[0]
    return np.append(floor, np.clip(slopes, -STEEPEST, STEEPEST))


def _descended(
    points: Float64[np.ndarray, "P D"],
    weights: Float64[np.ndarray, "S K"],
    values: Float64[np.ndarray, "P S"],
    used: Float64[np.ndarray, "P S"],
) -> tuple[Float64[np.ndarray, "P D"], Float64[np.ndarray, " P"]]:
    """Each problem's (c, A) at the minimum that its point leads to, by Levenberg and Marquardt, and its Huber loss.

    A run far from the law counts as the loss's slope there says, so that a step minimises a bound of the loss.
    """
    count = used.sum(axis=1)

    def loss(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rises = np.exp(at[:, 1:] @ weights.T)
        off = (at[:, :1] + rises - values) / DELTA
        near = np.clip(off, -1.0, 1.0)
        return (used * near * (off - near / 2)).sum(axis=1) / count, off, rises

    damping = np.full((len(points), 1), 1e-3)
    losses, off, rises = loss(points)
    for _ in range(_MOST_STEPS):
        new = np.clip(points - _step(weights, off, rises, used, damping), *_limits(points.shape[1]))
        new_losses, new_off, new_rises = loss(new)
        better = new_losses < losses
        fallen = np.where(better, losses - new_losses, 0.0)
        losses, moved = np.where(better, new_losses, losses), better[:, None]
        points, off, rises = (
            np.where(moved, new, points),
            np.where(moved, new_off, off),
            np.where(moved, new_rises, rises),
        )
        damping = np.clip(np.where(moved, damping / 5, damping * 5), 1e-9, 1e9)
        if (fallen <= 1e-12 * (losses + 1e-12)).all() and (moved | (damping > 1e6)).all():
            break
    return points, losses


def _step(
    weights: Float64[np.ndarray, "S K"],
    off: Float64[np.ndarray, "P S"],
    rises: Float64[np.ndarray, "P S"],
    used: Float64[np.ndarray, "P S"],
    damping: Float64[np.ndarray, "P 1"],
) -> Float64[np.ndarray, "P D"]:
    """What Levenberg and Marquardt take off each problem's point, in which the runs are `off` by so many deltas."""
    slopes = np.concatenate([np.ones((*rises.shape, 1)), rises[..., None] * weights], axis=-1) / DELTA
    counts = used / np.maximum(np.abs(off), 1.0)
    gradient = np.einsum("psd,ps->pd", slopes, counts * off)
    curvature = np.swapaxes(slopes * counts[..., None], 1, 2) @ slopes
    diagonal = np.einsum("pdd->pd", curvature)
    ridge = damping * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True)  # a domain may be in none of the runs
    return np.linalg.solve(curvature + ridge[..., None] * np.eye(slopes.shape[-1]), gradient[..., None])[..., 0]


def _limits(size: int) -> tuple[np.ndarray, np.ndarray]:
    high = np.full(size, STEEPEST)
    high[0] = np.inf
    return -high, high


def _rank_correlation(a: Float64[np.ndarray, " S"], b: Float64[np.ndarray, " S"]) -> float:
    """Spearman's; 0 where one of them is constant."""
    first, second = (rankdata(x) - (len(x) + 1) / 2 for x in (a, b))
    lengths = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / lengths) if lengths > 0 else 0.0
