"""dynamic_moe against a float64 transcription of its formulas and the spec's check value."""

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import HELD_OUT, ROUTERS
from dataflex_jax.policies.mixers.dynamic_moe import dynamic_moe
from tests.helpers.fake_signals import FakeRows, FakeSignals
from tests.helpers.observations import of_domains


def refreshed(mixer, state, gates, groups):
    return mixer.refresh(state, FakeSignals(held_out=FakeRows(gates=gates, groups=groups)))


def transcription(weights, gates, groups, eta, c):
    """(D, the next weights), one domain at a time, in float64."""
    number = len(weights)
    shares = []
    for i in range(number):
        total = np.zeros(gates.shape[1])
        for row, group in zip(gates, groups, strict=True):
            total += row if group == i else 0
        shares.append(total / np.abs(total).sum())
    distance = np.array([np.mean([np.sqrt(((a - b) ** 2).sum()) for b in shares]) for a in shares])
    raw = np.array(weights, np.float64) * np.exp(eta * distance)
    return distance, (1 - c) * raw / raw.sum() + c / number


def test_check_value():
    mixer = dynamic_moe()
    loads = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    state = refreshed(mixer, mixer.init(jnp.ones(3) / 3), loads, [0, 1, 2])
    np.testing.assert_allclose(state.distance, [0.30120078, 0.3133394, 0.27460555], atol=1e-7)
    np.testing.assert_allclose(state.weights, [0.34475784, 0.38710158, 0.26814058], atol=1e-6)


@pytest.mark.parametrize(("eta", "c"), [(10.0, 0.05), (3.0, 0.0), (0.5, 0.3)])
def test_equals_the_transcription(eta, c):
    rng = np.random.default_rng(0)
    mixer, groups = dynamic_moe(eta=eta, c=c), np.array([0, 1, 1, 2, 2, 2, 3])
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    state = mixer.init(jnp.asarray(weights, jnp.float32))
    for count in range(1, 6):
        gates = rng.integers(0, 40, (7, 5)) + rng.integers(0, 2, 5)
        distance, weights = transcription(weights, gates, groups, eta, c)
        state = refreshed(mixer, state, gates, groups)
        np.testing.assert_allclose(state.distance, distance, rtol=1e-5)
        np.testing.assert_allclose(mixer.sampling_weights(state), weights, atol=1e-5)
        assert state.count == count


def test_a_domain_whose_tokens_use_other_experts_gains_weight():
    mixer, state = dynamic_moe(), dynamic_moe().init(jnp.ones(3) / 3)
    for _ in range(3):
        state = refreshed(mixer, state, np.array([[9, 9, 1], [9, 8, 1], [0, 1, 20]]), [0, 1, 2])
    assert state.weights.argmax() == 2
    assert state.weights[2] > 0.9
    assert state.weights.min() >= 0.05 / 3 * (1 - 1e-5)


def test_between_two_updates_nothing_moves():
    mixer = dynamic_moe()
    assert mixer.needs == {HELD_OUT, ROUTERS}
    state = mixer.init(jnp.asarray([0.7, 0.3]))
    assert mixer.update(state, of_domains(1, [3, 2], [1, 1])) is state


@pytest.mark.parametrize(("option", "value"), [("eta", 0.0), ("eta", -1.0), ("c", 1.5), ("c", -0.1)])
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        dynamic_moe(**{option: value})


def test_a_dense_model_is_refused_by_name_before_the_first_step():
    from dataflex_jax.configs import base
    from dataflex_jax.policies.active import active_policies
    from dataflex_jax.training.learner import make_learner

    config = base.get_config("mixer=dynamic_moe")
    policies = active_policies(config).drawing(np.ones(2) / 2)
    refused = r"architecture='qwen2' is dense and mixer 'dynamic_moe' needs a mixture of experts; accepted: 'mixtral', "
    with pytest.raises(InputError, match=refused):
        make_learner(config, 300, policies, np.ones(2) / 2, None)
