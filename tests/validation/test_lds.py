"""The linear datamodeling score against its definition, and its intervals."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from dataflex_jax.validation import lds

N, M, GROUPS = 60, 24, 3


@pytest.fixture(scope="module")
def members():
    return lds.subsets(N, M, 0.5, seed=3)


def test_subsets_are_distinct_rows_and_the_first_ones_stay(members):
    assert members.shape == (M, N // 2)
    assert all((np.diff(ids) > 0).all() and ids[0] >= 0 and ids[-1] < N for ids in members)
    assert len({tuple(ids) for ids in members}) == M
    np.testing.assert_array_equal(lds.subsets(N, 2 * M, 0.5, seed=3)[:M], members)
    assert not np.array_equal(lds.subsets(N, M, 0.5, seed=4), members)


@pytest.mark.parametrize("levels", [3, 10**6])  # many ties, and none
def test_it_is_the_mean_of_spearmans_over_the_groups(members, levels):
    random = np.random.default_rng(0)
    scores = random.integers(0, levels, (N, GROUPS)).astype(float)
    losses = random.integers(0, levels, (M, GROUPS)).astype(float)
    expected = []
    for group in range(GROUPS):
        sums = [sum(scores[i, group] for i in ids) for ids in members]
        expected.append(spearmanr(sums, -losses[:, group]).statistic)
    found = lds.lds(scores, losses, members, np.zeros(5), seed=0)
    np.testing.assert_allclose([group.value for group in found.groups], expected, atol=1e-12)
    assert found.overall.value == pytest.approx(np.mean(expected))
    assert all(each.low < each.value < each.high for each in (found.overall, *found.groups))


def test_scores_that_foretell_everything_have_one_and_random_ones_have_zero_in_the_middle(members):
    random = np.random.default_rng(1)
    scores = random.normal(size=(N, GROUPS))
    losses = -lds.foretold(scores, members)
    by_chance = lds.random_lds(losses, members, N, seed=0)
    found = lds.lds(scores, losses, members, by_chance, seed=0)
    np.testing.assert_allclose(found.overall, 1.0)
    assert found.above_random == 1.0
    middle = lds.middle(by_chance)
    assert middle.low < -0.1 < middle.value < 0.1 < middle.high
    np.testing.assert_array_equal(by_chance, lds.random_lds(losses, members, N, seed=0))


def test_the_interval_covers_what_many_subsets_give():
    """Of 20 studies of noisy losses, the 95 % intervals miss the figure of a large one now and then only."""
    random = np.random.default_rng(2)
    scores = random.normal(size=(N, 1))

    def study(count, seed):
        ids = lds.subsets(N, count, 0.5, seed)
        sums = lds.foretold(scores, ids)
        return lds.lds(scores, -sums + random.normal(size=sums.shape) * sums.std(), ids, np.zeros(1), seed).overall

    truth = study(800, 0).value
    found = [study(32, 1 + seed) for seed in range(20)]
    assert sum(interval.low <= truth <= interval.high for interval in found) >= 17


def test_values_that_are_all_equal_have_no_rank_correlation():
    equal, other = np.ones((5, 1)), np.arange(5.0)[:, None]
    assert np.isnan(lds.spearman(equal, other)).all()
