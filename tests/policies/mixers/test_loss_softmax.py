"""The loss_softmax mixer against a float64 transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.mixers.loss_softmax import loss_softmax
from tests.helpers.observations import of_domains


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (0.3, 0.8)])
def test_equals_the_transcription(temperature, smoothing):
    """The last domain is not seen in the first five steps, the others now and then not."""
    rng = np.random.default_rng(0)
    mixer = loss_softmax(temperature=temperature, smoothing=smoothing)
    state = mixer.init(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    np.testing.assert_allclose(mixer.sampling_weights(state), [0.4, 0.3, 0.2, 0.1])
    update = jax.jit(mixer.update)
    average = [None] * 4
    for step in range(1, 15):
        losses, rows = rng.uniform(1, 6, 4), rng.integers(0, 3, 4)
        rows[0] += 1
        rows[3] *= step > 5
        for i in np.flatnonzero(rows):
            average[i] = losses[i] if average[i] is None else smoothing * average[i] + (1 - smoothing) * losses[i]
        known = np.mean([x for x in average if x is not None])
        logits = np.array([known if x is None else x for x in average]) / temperature
        state = update(state, of_domains(step, losses * (rows > 0), rows))
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(mixer.sampling_weights(state), expected, rtol=1e-4)


def test_a_resumed_run_keeps_what_it_had_learned():
    mixer = loss_softmax()
    fresh = mixer.init(jnp.asarray([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(mixer.on_resume(fresh, fresh).weights, fresh.weights)
    old = mixer.update(fresh, of_domains(1, [3.0, 1.0, 0.0], [2, 2, 0]))
    np.testing.assert_allclose(mixer.on_resume(old, fresh).weights, old.weights, rtol=1e-6)


@pytest.mark.parametrize(("option", "value"), [("temperature", 0.0), ("smoothing", 1.0)])
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = {value}: must be"):
        loss_softmax(**{option: value})
