"""Random proportions."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.policies.mixers.random import random
from tests.helpers.observations import of_domains

NATURAL = jnp.asarray([0.6, 0.3, 0.1])


def draws(seed, updates):
    mixer = random()
    state = mixer.init(NATURAL)
    weights = []
    for update in updates:
        observation = of_domains(1, [1, 1, 1], [1, 1, 1], drawn_with=NATURAL)
        state = mixer.update(state, observation._replace(update=jnp.int32(update), key=jax.random.key(seed)))
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
