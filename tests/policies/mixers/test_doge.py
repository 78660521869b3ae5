"""DoGE and its form with a target set against float64 transcriptions on explicit gradients, and the check value."""

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import TARGETS, DomainGradients
from dataflex_jax.policies.mixers.doge import average, doge
from tests.helpers.fake_signals import FakeSignals
from tests.helpers.observations import of_domains


def signals(gradients, lr, target=None):
    """Those of a model whose domains have these gradients."""
    products = DomainGradients(
        gram=jnp.asarray(gradients @ gradients.T, jnp.float32),
        target=None if target is None else jnp.asarray(gradients @ target, jnp.float32),
        learning_rate=jnp.float32(lr),
    )
    return FakeSignals(domain_gradients=products)


def transcription(gradients, lr, w, mu, c, clip, target=None):
    """The next w, from the gradients themselves."""
    num_domains = len(gradients)
    norm = np.mean([np.sqrt((g**2).sum()) for g in gradients])
    raised = []
    for i, g in enumerate(gradients):
        aim = sum(gradients[j] for j in range(num_domains) if j != i) if target is None else target
        score = min(max(lr * (g * aim).sum() / norm, 0.0), clip * lr)
        raised.append(w[i] * np.exp(score / mu))
    return (1 - c) * np.array(raised) / sum(raised) + c / num_domains


@pytest.mark.parametrize("targets", ["others", "targets"])
@pytest.mark.parametrize(("mu", "c", "clip", "ema"), [(0.01, 0.0, 5.0, 0.0), (0.003, 0.1, 0.8, 0.7)])
def test_equals_the_transcription(targets, mu, c, clip, ema):
    rng = np.random.default_rng(0)
    mixer = doge(mu=mu, c=c, clip=clip, targets=targets, ema=ema)
    w = smoothed = np.array([0.4, 0.3, 0.2, 0.1])
    state = mixer.init(jnp.asarray(w))
    weights = []
    for lr in (1e-3, 8e-4, 6e-4, 1e-4):
        gradients, target = rng.normal(0.3, 1, (4, 9)), rng.normal(0.3, 1, 9)
        w = transcription(gradients, lr, w, mu, c, clip, target if targets == "targets" else None)
        smoothed = ema * smoothed + (1 - ema) * w
        weights.append(w)
        state = mixer.refresh(state, signals(gradients, lr, target))
        np.testing.assert_allclose(state.weights, w, rtol=1e-4)
        np.testing.assert_allclose(mixer.sampling_weights(state), smoothed, rtol=1e-4)
    np.testing.assert_allclose(average(state), np.mean(weights, axis=0), rtol=1e-4)


def test_check_value():
    gradients = np.array([[1.0, 0, 2], [0, 1, 1], [2, 1, 0]])
    mixer = doge(initial_proportions="uniform")
    assert mixer.needs == frozenset()
    assert doge(targets="targets").needs == {TARGETS}
    state = mixer.refresh(mixer.init(jnp.asarray([0.8, 0.1, 0.1])), signals(gradients, 5e-4))
    np.testing.assert_allclose(mixer.sampling_weights(state), [0.33901999, 0.33049, 0.33049], atol=2e-7)


def test_a_domain_whose_gradient_opposes_the_others_is_not_sampled_less_than_by_its_share():
    """Scores are clipped below at 0: an opposing domain falls only as the others rise."""
    gradients = np.array([[1.0, 0.1], [1.0, 0.0], [-3.0, 0.0]])
    state = doge().refresh(doge().init(jnp.ones(3) / 3), signals(gradients, 1e-3))
    np.testing.assert_array_equal(state.score, [0, 0, 0])
    np.testing.assert_allclose(state.weights, 1 / 3, rtol=1e-6)


def test_steps_between_updates_change_nothing():
    mixer = doge()
    state = mixer.init(jnp.asarray([0.7, 0.3]))
    assert mixer.update(state, of_domains(5, [1.0, 2.0], [3, 4])) is state
    np.testing.assert_allclose(average(state), [0.7, 0.3], rtol=1e-6)


def test_the_target_form_without_a_target_set_is_refused():
    mixer = doge(targets="targets")
    with pytest.raises(InputError, match="mixer 'doge' needs a target set where targets = 'targets'"):
        mixer.refresh(mixer.init(jnp.ones(2) / 2), signals(np.eye(2), 1e-3))


def test_a_resumed_run_with_a_further_domain_has_a_distribution():
    mixer = doge()
    fresh = mixer.init(jnp.ones(3) / 3)
    old = fresh._replace(weights=jnp.asarray([0.8, 0.2, 1 / 3]), smoothed=jnp.asarray([0.6, 0.4, 1 / 3]))
    np.testing.assert_allclose(mixer.on_resume(old, fresh).smoothed, 1 / 3, rtol=1e-6)
    started = mixer.on_resume(old._replace(count=jnp.int32(4)), fresh)
    np.testing.assert_allclose(started.smoothed, np.array([0.6, 0.4, 1 / 3]) / (4 / 3), rtol=1e-6)
    np.testing.assert_allclose(started.weights, np.array([0.8, 0.2, 1 / 3]) / (4 / 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("mu", 0.0), ("c", 1.5), ("clip", 0.0), ("targets", "valid"), ("ema", 1.0)]
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = {value!r}: must be"):
        doge(**{option: value})
