"""The mixers without a bandit: fixed and random proportions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.mixers.random import random
from dataflex_jax.policies.mixers.static import static
from tests.policies.test_odm import observe

NATURAL = jnp.asarray([0.6, 0.3, 0.1])


def test_static_keeps_its_proportions():
    mixer = static(proportions=(2, 1, 1))
    state = mixer.init(NATURAL)
    after = mixer.update(state, observe(1, [9, 1, 1], [1, 1, 1], [1 / 3] * 3))
    np.testing.assert_array_equal(mixer.sampling_weights(after), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(static().init(NATURAL).weights, NATURAL)
    np.testing.assert_allclose(static(proportions="uniform").init(NATURAL).weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ((1, 1), r"proportions = \(1, 1\): has 2 entries; one for each of the 3"),
        ((1, -1, 1), "must be a finite number >= 0"),
        ((1, float("nan"), 1), "must be a finite number >= 0"),
        ((0, 0, 0), "at least one entry must be > 0"),
        ("even", "proportions = 'even': must be a tuple of numbers or \"uniform\""),
    ],
)
def test_impossible_proportions_are_refused(proportions, message):
    with pytest.raises(ValueError, match=message):
        static(proportions=proportions).init(NATURAL)


def draws(seed, updates):
    mixer = random()
    state = mixer.init(NATURAL)
    weights = []
    for update in updates:
        observation = observe(1, [1, 1, 1], [1, 1, 1], NATURAL)._replace(
            update=jnp.int32(update), key=jax.random.key(seed)
        )
        state = mixer.update(state, observation)
        weights.append(np.asarray(mixer.sampling_weights(state)))
    return weights


def test_random_draws_anew_at_each_update_and_only_then():
    """The peer's random mixer draws the same proportions for ever."""
    warmup, first, again, second = draws(0, [-1, 0, 0, 1])
    np.testing.assert_array_equal(warmup, NATURAL)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - draws(1, [0])[0]).max() > 1e-3
    np.testing.assert_array_equal(second, draws(0, [1])[0])


def test_random_is_uniform_over_the_simplex():
    weights = np.stack(draws(0, range(400)))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    # Dirichlet(1, 1, 1): mean 1/3, variance 2/36 of each share.
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=4 * np.sqrt(2 / 36 / 400))
    np.testing.assert_allclose(weights.var(axis=0), 2 / 36, rtol=0.3)
