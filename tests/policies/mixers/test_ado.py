"""ADO against a float64 transcription and the check value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.mixers import ado as ado_file
from dataflex_jax.policies.mixers.ado import ado
from tests.helpers.fake_signals import FakeSignals
from tests.helpers.observations import of_domains
from tests.helpers.power_laws import LAWS, law_losses


def test_check_value():
    law = jnp.asarray([[2, 0.8, 0.3], [1.5, 0.6, 0.02], [1.8, 0.9, 0.25]])
    mu = jnp.asarray([0.5, 0.3, 0.2])
    rho = ado_file.preference(law, jnp.full(3, 2_048_000), mu, mu)
    np.testing.assert_allclose(rho, [0.24357633, 0.6694773, 0.08694636], atol=3e-7)
    weights, average = ado_file.mixed(rho, mu, jnp.int32(1000))
    np.testing.assert_allclose(weights, [0.47435763, 0.33694773, 0.18869464], atol=3e-7)
    np.testing.assert_allclose(average, np.array(mu) + (np.array(rho) - np.array(mu)) / 1001, atol=1e-7)


def transcription(laws, losses, rows, mu, step_size):
    """One domain at a time, in float64, with the laws given from the first step on; yields (w, average, h, n)."""
    num_domains = len(mu)
    n, h, average = np.zeros(num_domains), mu.copy(), mu.copy()
    for t in range(1, len(losses) + 1):
        batch = rows[t - 1]
        rho = np.zeros(num_domains)
        for i, (a, _, b) in enumerate(laws):
            n[i] += batch.sum() if step_size == "same" else batch[i]
            h[i] = 0.9 * h[i] + 0.1 * batch[i] / batch.sum()
            slope = max(b, 0.05) * (np.exp(a) * max(n[i], 1) ** -b) / max(n[i], 1)
            rho[i] = slope * mu[i] * np.sqrt(h[i])
        rho = np.maximum(rho / rho.sum(), 0.01)
        rho = rho / rho.sum()
        w = 0.9 * average + 0.1 * rho
        average = average + (rho - average) / (t + 1)
        yield w, average, h, n


@pytest.mark.parametrize("step_size", ["same", "own"])
def test_equals_the_transcription(step_size):
    rng = np.random.default_rng(0)
    mu = np.array([0.4, 0.3, 0.2, 0.1])
    laws = np.array([[2, 0.8, 0.3], [1.5, 0.6, 0.02], [1.8, 0.9, 0.25], [-9, 0.5, 0.5]])
    losses, rows = rng.uniform(1, 6, (30, 4)), rng.integers(0, 20, (30, 4))
    mixer = ado(step_size=step_size)
    state = mixer.init(jnp.asarray(mu))
    state = state._replace(law=jnp.asarray(laws, jnp.float32), fitted=jnp.ones(4, bool))
    update = jax.jit(mixer.update)
    for t, (w, average, h, n) in enumerate(transcription(laws, losses, rows, mu, step_size), 1):
        state = update(state, of_domains(t, losses[t - 1], rows[t - 1]))
        np.testing.assert_allclose(mixer.sampling_weights(state), w, rtol=1e-5)
        np.testing.assert_allclose(state.average, average, rtol=1e-5)
        np.testing.assert_allclose(state.drawn, h, rtol=1e-5)
        np.testing.assert_array_equal(state.samples, n)


def trained(mixer, steps, state=None, first=1, laws=LAWS[:2], rows=(24, 8)):
    """The state after steps in which the losses follow power laws in the rows so far, with an update after the last."""
    rows = np.array(rows)
    state = mixer.init(jnp.asarray(rows / rows.sum())) if state is None else state
    update = jax.jit(mixer.update)
    for step in range(first, first + steps):
        losses = law_losses(laws, np.full((len(laws), 1), 32.0 * step))[:, 0]
        state = update(state, of_domains(step, losses, rows))
    return mixer.refresh(state, FakeSignals())


@pytest.mark.slow
def test_the_weights_stay_at_the_prior_until_there_is_a_law_and_then_move():
    mixer = ado(ignore=4, smoothing=2, history=32)
    state = trained(mixer, 4 + 2 * 8 - 1)
    assert not np.asarray(state.fitted).any()
    np.testing.assert_allclose(mixer.sampling_weights(state), [0.75, 0.25])
    state = trained(mixer, 31, state, first=20)
    assert np.asarray(state.fitted).all()
    np.testing.assert_allclose(mixer.sampling_weights(state), [0.75, 0.25])
    predicted = law_losses(np.asarray(state.law, np.float64), np.full((2, 1), 32.0 * 40))
    np.testing.assert_allclose(predicted, law_losses(LAWS[:2], np.full((2, 1), 32.0 * 40)), rtol=0.01)
    state = trained(mixer, 1, state, first=51)
    assert abs(float(mixer.sampling_weights(state)[0]) - 0.75) > 1e-3
    np.testing.assert_allclose(np.sum(mixer.sampling_weights(state)), 1, rtol=1e-6)


def test_a_fit_that_is_not_finite_leaves_the_last_one():
    mixer = ado(ignore=0, smoothing=1, history=32)
    state = trained(mixer, 12)
    bad = state._replace(history=state.history._replace(loss_sum=state.history.loss_sum.at[0].set(jnp.inf)))
    after = mixer.refresh(bad, FakeSignals())
    np.testing.assert_array_equal(after.law[0], state.law[0])
    assert np.isfinite(np.asarray(after.law)).all()
    assert np.asarray(after.fitted).all()


def test_a_resumed_run_with_a_further_domain_waits_for_its_law():
    mixer = ado(ignore=0, smoothing=1, history=32)
    state = trained(mixer, 12)
    fresh = mixer.init(jnp.ones(3) / 3)
    aligned = jax.tree.map(lambda old, new: jnp.concatenate([old, new[2:]]) if old.ndim else old, state, fresh)
    resumed = mixer.on_resume(aligned, fresh)
    np.testing.assert_allclose(resumed.prior, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(resumed.weights, np.array([0.75, 0.25, 1 / 3]) / (4 / 3), rtol=1e-6)
    np.testing.assert_array_equal(resumed.fitted, [True, True, False])
    after = mixer.update(resumed, of_domains(13, [2.0, 2.0, 2.0], [4, 4, 4]))
    np.testing.assert_array_equal(after.weights, resumed.weights)


def test_the_log_has_the_laws_by_their_parameters_and_no_losses():
    mixer = ado(ignore=0, smoothing=1, history=32)
    state = jax.device_get(trained(mixer, 12))
    logged = mixer.log(state)
    assert list(logged) == list(state._fields)
    for name, values in zip("aeb", state.law.T, strict=True):
        np.testing.assert_array_equal(logged["law"][name], values)
    assert state.fitted.all()
    assert set(logged["history"]) == {"filled", "steps", "block"}
    assert all(np.ndim(leaf) < 2 for leaf in jax.tree.leaves(logged))


@pytest.mark.parametrize(
    ("option", "value"), [("step_size", "all"), ("ignore", -1), ("smoothing", 0), ("history", 15), ("history", 8)]
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = {value!r}: must be"):
        ado(**{option: value})


def test_a_domain_without_prior_is_refused():
    with pytest.raises(InputError, match=r"^config.mixer.prior = \(1, 0\): must be > 0 for every domain"):
        registry.checked("mixer", ado(prior=(1, 0)).init, jnp.ones(2) / 2)
