"""The sort and the draws that several selectors share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.common import ranking


@pytest.mark.parametrize("n", [1, 2, 17, 300])
def test_top_is_a_stable_sort_with_nans_last(n):
    rng = np.random.default_rng(n)
    scores = rng.integers(-3, 3, n).astype(np.float32) * rng.choice([1.0, -0.0], n).astype(np.float32)
    scores[rng.random(n) < 0.2] = np.nan
    expected = sorted(range(n), key=lambda i: (np.isnan(scores[i]), -scores[i] if scores[i] == scores[i] else 0, i))
    for num in {1, n // 2, n}:
        np.testing.assert_array_equal(jax.jit(ranking.top, static_argnums=1)(scores, num), expected[:num])


STRATA = np.array([2, 0, 1, 1, 0, 2, 0, 0])
WEIGHTS = np.array([1.0, 4.0, 0.0])


def sequential_inclusion(p, num):
    """How often each candidate is among `num` sequential draws without replacement, by recursion over all of them."""
    total = np.zeros(len(p))

    def extend(taken, chance):
        if len(taken) == num:
            total[list(taken)] += chance
            return
        rest = 1 - p[list(taken)].sum()
        for i in np.flatnonzero(p):
            if i not in taken:
                extend((*taken, i), chance * p[i] / rest)

    extend((), 1.0)
    return total


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_have_the_distribution_of_their_weights(replacement):
    p = WEIGHTS[STRATA] / WEIGHTS[STRATA].sum()

    @jax.jit
    @jax.vmap
    def draws(key):
        return ranking.draw(jnp.asarray(STRATA), jnp.log(WEIGHTS), key, 3, replacement=replacement)

    trials = 20_000
    choice = draws(jax.random.split(jax.random.key(3), trials))
    ids = np.asarray(choice.ids)
    expected = 3 * p if replacement else sequential_inclusion(p, 3)
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=8) / trials, expected, atol=0.02)
    np.testing.assert_allclose(np.bincount(ids[:, 0], minlength=8) / trials, p, atol=0.015)
    assert not np.isin(ids, [0, 5]).any()
    repeated = (np.diff(np.sort(ids, axis=1)) == 0).any(axis=1)
    assert repeated.any() == replacement
    np.testing.assert_allclose(choice.all_scores[0], p, rtol=1e-6)
    np.testing.assert_array_equal(choice.scores, np.asarray(choice.all_scores[0])[ids])


def test_no_candidate_at_all_has_probability_zero_everywhere():
    np.testing.assert_array_equal(ranking.probabilities(jnp.array([0, 0]), jnp.array([-jnp.inf])), [0, 0])


def test_unlikely_candidates_are_sampled_beside_likely_ones():
    """Of weights 1 after one of 1e8 sums in float32 would know every eighth place alone."""
    p = np.ones(100_001, np.float32)
    p[0] = 1e8
    sample = jax.jit(lambda key: ranking.sample(jnp.asarray(p), key, 200_000, then=p, replacement=True).ids)
    ids = np.asarray(sample(jax.random.key(0)))
    rare = ids[ids > 0]
    assert 150 < len(rare) < 250
    assert len(np.unique(rare % 8)) == 8


def test_without_replacement_samples_are_sequential_draws():
    p = np.array([0.5, 0.0, 0.3, 0.15, 0.05], np.float32)
    keys = jax.vmap(jax.random.key)(np.arange(20_000))
    draws = jax.vmap(lambda key: ranking.sample(jnp.asarray(p), key, 2, then=p).ids)(keys)
    often = np.bincount(np.ravel(draws), minlength=5) / len(keys)
    np.testing.assert_allclose(often, sequential_inclusion(p, 2), atol=0.02)
