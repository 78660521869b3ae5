"""delta_loss against the check values, a float64 transcription, and the peer's recorded probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies import Evidence
from dataflex_jax.policies.selectors.delta_loss import Falls, delta_loss, in_window, window
from tests.helpers.fake_signals import FakeRows, FakeSignals, request
from tests.helpers.observations import recorded


def transcription(delta, update, updates, w):
    """The probabilities in float64."""
    n = len(delta)
    x = (update - 1) / (updates - 1) if updates > 1 else 1.0
    start = 1 / (1 + math.exp(-10 * (x - 0.5))) * (1 - w) * n
    start, end = int(start), int(start + w * n)
    order = sorted(range(n), key=lambda i: (-delta[i], i))
    negative = [place for place, i in enumerate(order) if delta[i] < 0]
    if negative:
        end = min(end, negative[0])
    if start >= end:
        start, end = 0, max(1, int(w * n))
    p = np.full(n, 0.025)
    p[order[start:end]] = 1
    return p / p.sum()


@pytest.mark.parametrize(
    ("update", "updates", "expected"), [(2, 3, (400, 600)), (3, 3, (794, 994)), (1, 1, (794, 994))]
)
def test_check_values_of_the_window(update, updates, expected):
    start, end = jax.jit(window, static_argnums=(2, 3))(update, updates, 1000, 0.2)
    assert (int(start), int(end)) == expected


def test_the_window_is_exact_in_large_pools():
    def of_update(update, updates):
        return window(update, updates, 1_000_000, 0.2)

    found = jax.jit(jax.vmap(of_update))(*(jnp.asarray(x, jnp.int32) for x in np.triu_indices(110, 1)))
    assert found[0].dtype == found[1].dtype == jnp.int32
    for update, updates, start, end in zip(*np.triu_indices(110, 1), *map(np.asarray, found), strict=True):
        x = (update - 1) / (updates - 1) if updates > 1 else 1.0
        expected = 1 / (1 + math.exp(-10 * (x - 0.5))) * (1 - 0.2) * 1_000_000
        assert (start, end) == (int(expected), int(expected + 0.2 * 1_000_000)), (update, updates)


@pytest.mark.parametrize("w", [0.2, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 3, 53, 200])
def test_equals_the_transcription(n, w):
    rng = np.random.default_rng(n)
    selector = delta_loss(window_size=w)
    choose = jax.jit(selector.choose, static_argnums=2)
    for shift in (-0.5, 0.0, 1.0):
        delta = np.round(rng.normal(shift, 1, n), 1).astype(np.float32)
        for update in range(1, 8):
            evidence = Evidence(Falls(jnp.asarray(delta), jnp.ones(n)))
            choice = choose(evidence, request(update, 7, seed=update), (n + 1) // 2)
            np.testing.assert_allclose(choice.all_scores, transcription(delta, update, 7, w), rtol=1e-5)
            assert len(set(np.asarray(choice.ids))) == (n + 1) // 2


def test_an_empty_window_falls_back_to_the_largest_falls():
    delta = jnp.asarray([-1.0, 3, -2, 1, 2, -3, -4, -5, -6, -7])
    inside = in_window(delta, jnp.int32(5), jnp.int32(5), 0.2)
    np.testing.assert_array_equal(np.flatnonzero(inside), [1, 4])


def test_the_baseline_is_the_losses_before_training():
    signals = FakeSignals(FakeRows(losses=[3.0, 2.0, np.nan]))
    selector = delta_loss()
    state = selector.init(signals)
    signals.candidates.losses = [1.0, 2.5, 1.0]
    evidence, state = selector.score(state, signals, request())
    np.testing.assert_allclose(evidence.rows.delta, [2.0, -0.5, np.nan])
    np.testing.assert_array_equal(evidence.rows.known, [1, 1, 1])
    np.testing.assert_array_equal(state["baseline"], [3, 2, np.nan])


def test_the_warmup_baseline_is_measured_by_the_first_update_whose_draw_is_uniform():
    rng = np.random.default_rng(0)
    before, after = rng.uniform(1, 4, (2, 40))
    signals = FakeSignals(FakeRows(losses=before))
    selector = delta_loss(baseline="warmup")
    state = selector.init(signals)
    assert signals.candidates.asked == []
    evidence, state = selector.score(state, signals, request(1, 5))
    np.testing.assert_allclose(selector.choose(evidence, request(1, 5), 10).all_scores, 1 / 40, rtol=1e-5)
    signals.candidates.losses = after
    evidence, _ = selector.score(state, signals, request(2, 5))
    np.testing.assert_allclose(evidence.rows.delta, before - after, atol=1e-6)
    expected = transcription(np.asarray(evidence.rows.delta), 2, 5, 0.2)
    np.testing.assert_allclose(selector.choose(evidence, request(2, 5), 10).all_scores, expected, rtol=1e-5)


def test_most_of_the_draw_comes_from_the_window():
    delta = jnp.linspace(0, 1, 1000)
    selector = delta_loss()
    evidence = Evidence(Falls(delta, jnp.ones(1000)))
    ids = selector.choose(evidence, request(2, 3), 50).ids
    inside = np.asarray(in_window(delta, jnp.int32(2), jnp.int32(3), 0.2))[np.asarray(ids)]
    assert inside.mean() > 0.75
    assert selector.choose(evidence, request(2, 3), 50).scores.shape == (50,)
    assert delta_loss(replacement=True).replacement


@pytest.mark.parametrize(("option", "value"), [("window_size", 0.0), ("window_size", 1.5), ("baseline", "last")])
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        delta_loss(**{option: value})


def test_equals_the_peers_recorded_probabilities():
    numbers = recorded("delta_loss_core.npz")
    selector = delta_loss()
    for call in range(2, 6):
        start, end = window(jnp.int32(call), jnp.int32(5), 120, 0.2)
        np.testing.assert_array_equal([start, end], numbers[f"call{call}/window"])
        delta = jnp.asarray(numbers["baseline"] - numbers[f"call{call}/current"])
        choice = selector.choose(Evidence(Falls(delta, jnp.ones(120))), request(call, 5), 16)
        np.testing.assert_allclose(choice.all_scores, numbers[f"call{call}/probs"], rtol=1e-5)
