"""The random selector."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.policies import Evidence
from dataflex_jax.policies.selectors.random import random
from tests.helpers.fake_signals import FakeRows, FakeSignals, request


def test_random_draws_distinct_candidates_by_the_key_alone():
    selector, signals = random(), FakeSignals(FakeRows(losses=np.arange(50.0)))
    evidence, state = selector.score({}, signals, request())
    assert signals.candidates.asked == []
    assert state == {}
    choose = jax.jit(selector.choose, static_argnums=2)
    draws = [np.asarray(choose(evidence, request(seed=seed), 20).ids) for seed in (1, 1, 2)]
    assert len(set(draws[0])) == 20
    np.testing.assert_array_equal(draws[0], draws[1])
    assert set(draws[0]) != set(draws[2])
    np.testing.assert_array_equal(np.sort(choose(evidence, request(), 50).ids), np.arange(50))


def test_random_is_uniform():
    ids = jax.vmap(lambda key: random().choose(Evidence(jnp.zeros(10)), request()._replace(key=key), 3).ids)(
        jax.random.split(jax.random.key(0), 4000)
    )
    counts = np.bincount(np.asarray(ids).ravel(), minlength=10)
    assert np.abs(counts / 4000 - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 4000)
