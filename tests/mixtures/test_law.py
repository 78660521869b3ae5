"""The log-linear law against SciPy, and what cross-validation says of it."""

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import huber
from scipy.stats import spearmanr

from dataflex_jax.errors import InputError
from dataflex_jax.mixtures import law
from dataflex_jax.mixtures.law import Law
from tests.mixtures import planted


def mean_huber(found, runs):
    return huber(law.DELTA, found.at(runs.weights) - runs.values).mean(axis=0)


def by_scipy(runs, metric):
    """The smallest mean Huber loss of many random starts of another method."""
    random, best = np.random.default_rng(1), np.inf
    weights, values = runs.weights, runs.values[:, metric]
    for _ in range(20):
        start = np.append(values.min() - random.exponential(), random.normal(size=weights.shape[1]))
        fitted = least_squares(
            lambda p: p[0] + np.exp(weights @ p[1:]) - values,
            start,
            bounds=([-np.inf, *[-law.STEEPEST] * 5], [np.inf, *[law.STEEPEST] * 5]),
            loss="huber",
            f_scale=law.DELTA,
            max_nfev=500,
        )
        best = min(best, huber(law.DELTA, fitted.fun).mean())
    return best


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_no_other_method_finds_a_smaller_loss(noise):
    runs = planted.runs(24, noise)
    losses = mean_huber(law.fit(runs.weights, runs.values), runs)
    for metric, loss in enumerate(losses):
        assert loss <= by_scipy(runs, metric) * 1.001


def test_a_law_without_noise_is_found():
    runs = planted.runs(40, 0.0)
    found = law.fit(runs.weights, runs.values)
    np.testing.assert_allclose(found.floors, planted.law().floors, atol=1e-3)
    np.testing.assert_allclose(found.slopes, planted.law().slopes, atol=1e-2)


def test_outliers_move_it_little():
    runs = planted.runs(60, 0.005)
    values = runs.values.copy()
    values[::20] += 3.0
    found = law.fit(runs.weights, values)
    np.testing.assert_allclose(found.at(planted.prior()), planted.law().at(planted.prior()), atol=0.02)


def test_the_figures_are_of_runs_that_were_not_fitted():
    runs = planted.runs(30, 0.05)
    checked = law.cross_validated(runs.weights, runs.values, seed=3)
    order = np.random.Generator(np.random.Philox(key=[3, 2**62])).permutation(30)
    fold = order[0 :: law.FOLDS]
    others = np.setdiff1d(np.arange(30), fold)
    apart = law.fit(runs.weights[others], runs.values[others])
    np.testing.assert_allclose(checked.predicted[fold], apart.at(runs.weights[fold]), atol=1e-4)
    for metric in range(3):
        measured, predicted = runs.values[:, metric], checked.predicted[:, metric]
        assert checked.spearman[metric] == pytest.approx(spearmanr(measured, predicted).statistic)
        assert checked.r2[metric] == pytest.approx(1 - np.var(measured - predicted) / np.var(measured), abs=0.05)
    assert checked.foretells.all()


def test_of_noise_it_foretells_nothing():
    foretold = []
    for seed in range(4):
        runs = planted.runs(40, 0.3, values_of=lambda weights: np.full((len(weights), 3), 2.0), seed=seed)
        foretold.append(law.cross_validated(runs.weights, runs.values, seed).foretells)
    assert not np.any(foretold)


def test_a_weak_law_counts_beside_a_strong_one_and_noise_does_not():
    runs, random = planted.runs(40, 0.002), np.random.default_rng(5)
    noise = [0.0, 0.9 * np.std(runs.values[:, 1]), 5.0]
    values = runs.values + random.normal(size=runs.values.shape) * noise
    checked = law.cross_validated(runs.weights, values, seed=0)
    assert 0 < checked.r2[1] < 0.6
    assert checked.foretells.tolist() == [True, True, False]


def test_sensitivity_is_the_derivative_towards_a_domain():
    where, step = planted.prior(), 1e-6
    for domain in range(5):
        toward = (1 - step) * where + step * np.eye(5)[domain]
        change = (planted.law().at(toward) - planted.law().at(where)) / step
        np.testing.assert_allclose(planted.law().sensitivity(where)[:, domain], change, rtol=1e-4)


def test_a_constant_metric_is_named():
    with pytest.raises(InputError, match=r"^metric 'b' is the same in all 9 runs; leave it out with --fit"):
        law.check_values(("a", "b"), np.stack([np.arange(9.0), np.ones(9)], axis=1))


def test_values_of_any_size_are_fitted():
    runs = planted.runs(30, 0.0)
    found = law.fit(runs.weights, 1000 * runs.values)
    assert isinstance(found, Law)
    np.testing.assert_allclose(found.at(runs.weights), 1000 * runs.values, rtol=0.01)
