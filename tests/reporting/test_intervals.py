"""Means, spreads and intervals against SciPy's own tests, and what is not known of few values."""

import math

import numpy as np
import pytest
from scipy import stats

from dataflex_jax.reporting.intervals import difference, spread


def by_seed(values, first=0):
    return dict(enumerate(values, start=first))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_paired_intervals_are_students(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(1, 2, n), rng.normal(0, 1, n)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = difference(by_seed(ours), by_seed(theirs))
    np.testing.assert_allclose(found[:3], [(ours - theirs).mean(), *expected], rtol=1e-12)
    assert found.pairs == n


def test_pairs_are_those_of_the_seeds_that_both_have():
    found = difference({0: 1.0, 1: 2.0, 2: 9.0}, {2: 3.0, 1: 1.5, 7: 100.0})
    expected = stats.ttest_1samp([0.5, 6.0], 0).confidence_interval(0.95)
    np.testing.assert_allclose(found[:3], [3.25, *expected], rtol=1e-12)
    assert found.pairs == 2


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (9, 4)])
def test_other_intervals_are_welchs(sizes):
    rng = np.random.default_rng(sum(sizes))
    ours, theirs = rng.normal(1, 3, sizes[0]), rng.normal(0, 1, sizes[1])
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    # One seed in common makes no pairs.
    for first in (100, sizes[0] - 1):
        found = difference(by_seed(ours), by_seed(theirs, first=first))
        np.testing.assert_allclose(found[:3], [ours.mean() - theirs.mean(), *expected], rtol=1e-10)
        assert found.pairs == 0


def test_of_one_value_there_is_no_interval():
    for ours, theirs in (({0: 2.0}, {0: 1.0}), ({0: 2.0}, {0: 1.0, 1: 1.0})):
        found = difference(ours, theirs)
        assert (found.mean, found.low, found.high, found.sign) == (1.0, None, None, 0)
    assert spread(np.array([3.0])) == (3.0, None)
    assert spread(np.array([3.0, 5.0])) == (4.0, math.sqrt(2))


def test_the_sign_is_known_where_the_interval_leaves_out_zero():
    same = {0: 1.0, 1: 2.0}
    assert difference(same, {0: 0.0, 1: 1.0}).sign == 1
    assert difference({0: 0.0, 1: 1.0}, same).sign == -1
    assert difference(same, same).sign == 0
    assert difference({0: 1.0, 1: 1.0}, {5: 2.0, 6: 2.0}).sign == -1
