"""Random mixtures around the natural one."""

import numpy as np

from dataflex_jax.mixtures import drawing

NATURAL = np.array([0.6, 0.3, 0.1, 0.0])


def test_they_are_distributions_of_the_domains_that_there_are_without_small_weights():
    weights = np.stack([mixture.weights for mixture in drawing.drawn(NATURAL, 400, seed=1)])
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert (weights[:, 3] == 0).all()
    assert ((weights == 0) | (weights >= drawing.LEAST)).all()
    assert (weights.max(axis=1) > 0.95).mean() > 0.2  # weak: nearly one domain
    assert (np.abs(weights - NATURAL).max(axis=1) < 0.15).any()  # strong: nearly natural
    # Dirichlet(strength * natural) has the mean of the natural mixture, whatever the strength.
    np.testing.assert_allclose(weights.mean(axis=0), NATURAL, atol=0.06)


def test_the_first_ones_are_the_same_for_every_count_and_differ_by_seed():
    few, many, other = (drawing.drawn(NATURAL, count, seed) for count, seed in ((3, 7), (9, 7), (3, 8)))
    assert [m.name for m in few] == ["mixture 1", "mixture 2", "mixture 3"]
    for one, same, different in zip(few, many, other, strict=False):
        np.testing.assert_array_equal(one.weights, same.weights)
        assert not np.array_equal(one.weights, different.weights)


def test_deletions_leave_out_one_domain_of_those_there_are():
    without = drawing.deletions(["a", "b", "c", "d"], NATURAL)
    assert [m.name for m in without] == ["without a", "without b", "without c"]
    np.testing.assert_allclose(without[0].weights, [0, 0.75, 0.25, 0])
