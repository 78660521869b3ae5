"""ODM against a float64 transcription of its formulas, the spec's check value, and the peer's recorded trajectory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import HELD_OUT, registry
from dataflex_jax.policies.mixers.odm import VARIANTS, odm
from tests.helpers.fake_signals import FakeRows, FakeSignals
from tests.helpers.observations import of_domains


def transcription(variant, alpha, losses, seen, qs, warmup, min_rate=None):
    """The formulas in float64, one domain at a time; yields (reward, weights, eps) after each step."""
    num_domains = losses.shape[1]
    reward, eps = np.zeros(num_domains), 1 / num_domains
    if min_rate is None:
        min_rate = 0.03 if variant == "dataflex" else 0.0
    for s in range(1, len(losses) + 1):
        t = s if variant == "official" else s - warmup
        last_eps = eps
        eps = 1 / num_domains
        if t > 0:
            eps = max(min_rate, min(1 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * t))))
        for i in range(num_domains):
            if not seen[s - 1, i]:
                continue
            loss, q = losses[s - 1, i], qs[s - 1, i]
            if variant == "official":
                reward[i] = alpha * reward[i] + (1 - alpha) * math.exp(loss)
            elif variant == "exp3":
                reward[i] += (loss / 10) / q
            else:
                scale = 15 if variant == "dataflex" else 1
                reward[i] = alpha * reward[i] + (1 - alpha) * scale * loss / q
                if variant == "dataflex":
                    reward[i] = min(max(reward[i], -1e4), 1e4)
        if variant == "official":
            share = reward / reward.sum()
        else:
            logits = last_eps * reward
            logits = logits - logits.max()
            if variant == "dataflex":
                logits = np.maximum(logits, -5)
            share = np.exp(logits) / np.exp(logits).sum()
        yield reward.copy(), (1 - num_domains * eps) * share + eps, eps


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("num_domains", "warmup", "alpha"), [(3, 0, 0.9), (7, 4, 0.5), (2, 10, 0.9)])
def test_equals_the_transcription(variant, num_domains, warmup, alpha):
    rng = np.random.default_rng(num_domains)
    losses = rng.uniform(2, 9, (40, num_domains))
    seen = rng.random((40, num_domains)) < 0.7
    seen[:, 0] |= ~seen.any(axis=1)
    qs = rng.dirichlet(np.full(num_domains, 5.0), 40)
    mixer = odm(variant=variant, alpha=alpha)
    state = mixer.init(jnp.full(num_domains, 1 / num_domains))
    update = jax.jit(mixer.update)
    expected = transcription(variant, alpha, losses, seen, qs, warmup)
    for s, (reward, weights, eps) in enumerate(expected, 1):
        state = update(state, of_domains(s, losses[s - 1] * seen[s - 1], seen[s - 1], warmup, drawn_with=qs[s - 1]))
        np.testing.assert_allclose(state.reward, reward, rtol=3e-5)
        np.testing.assert_allclose(mixer.sampling_weights(state), weights, atol=2e-5)
        np.testing.assert_allclose(state.eps, eps, rtol=1e-6)
        assert abs(float(mixer.sampling_weights(state).sum()) - 1) < 1e-5
        assert float(mixer.sampling_weights(state).min()) >= eps * (1 - 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_held_out_losses_reward_by_their_fall_since_the_update_before(variant):
    rng = np.random.default_rng(1)
    groups = np.array([0, 1, 1, 2, 2, 2])
    losses = np.sort(rng.uniform(2, 4, (6, 6)), axis=0)[::-1]
    losses[:, 5] = np.nan  # a row without a token in the loss
    held_out = np.stack([losses[:, 0], losses[:, 1:3].mean(1), losses[:, 3:5].mean(1)], axis=1)
    falls = np.concatenate([np.zeros((1, 3)), held_out[:-1] - held_out[1:]])
    qs = rng.dirichlet(np.full(3, 5.0), 6)
    mixer = odm(variant=variant, alpha=0.5, reward="validation", reward_scale=7.0)
    state = mixer.init(jnp.full(3, 1 / 3))
    scale = {"exp3": 10, "dataflex": 1 / 15}.get(variant, 1.0)  # what the transcription multiplies with, undone
    expected = transcription(variant, 0.5, 7.0 * scale * falls, np.ones((6, 3), bool), qs, 0)
    for s, (reward, weights, eps) in enumerate(expected, 1):
        state = mixer.refresh(state, FakeSignals(held_out=FakeRows(losses=losses[s - 1], groups=groups)))
        state = mixer.update(state, of_domains(s, rng.uniform(2, 9, 3), [1, 0, 1], drawn_with=qs[s - 1]))
        np.testing.assert_allclose(state.reward, reward, rtol=3e-4, atol=1e-6)
        np.testing.assert_allclose(mixer.sampling_weights(state), weights, atol=2e-5)
        np.testing.assert_allclose(state.eps, eps, rtol=1e-6)


def test_between_two_updates_held_out_losses_reward_nothing():
    mixer = odm(reward="validation", reward_scale=50.0)
    assert HELD_OUT in mixer.needs
    natural = jnp.asarray([0.7, 0.3])
    state = mixer.init(natural)
    state = mixer.update(state, of_domains(1, [3, 2], [1, 1]))
    np.testing.assert_array_equal(mixer.sampling_weights(state), natural)
    for losses in ([3.0, 3.0], [2.9, 2.5]):
        state = mixer.refresh(state, FakeSignals(held_out=FakeRows(losses=losses, groups=[0, 1])))
        state = mixer.update(state, of_domains(2, [3, 2], [1, 1]))
    assert state.weights[1] > state.weights[0]
    np.testing.assert_allclose(state.fall, [0.1, 0.5], rtol=1e-5)
    after = mixer.update(state, of_domains(3, [9, 1], [1, 1]))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_of_a_new_domain_no_fall_is_known_yet():
    mixer = odm(reward="validation")
    fresh = mixer.init(jnp.ones(2) / 2)
    old = mixer.refresh(fresh, FakeSignals(held_out=FakeRows(losses=[3.0, 3.0], groups=[0, 1])))
    aligned = old._replace(measured=jnp.array([True, False]), held_out=jnp.array([3.0, 0.0]))
    state = mixer.refresh(
        mixer.on_resume(aligned, fresh), FakeSignals(held_out=FakeRows(losses=[2.0, 2.0], groups=[0, 1]))
    )
    assert state.fall.tolist() == [1.0, 0.0]


def test_check_value_of_the_official_form():
    mixer = odm(alpha=0.9)
    state = mixer.update(mixer.init(jnp.ones(3) / 3), of_domains(1000, [3, 2, 1], [1, 1, 1]))
    np.testing.assert_allclose(state.eps, 0.019136, atol=5e-7)
    np.testing.assert_allclose(state.weights, [0.64618635, 0.24981522, 0.10399843], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unseen_domain_keeps_its_reward(variant):
    mixer = odm(variant=variant)
    state = mixer.update(mixer.init(jnp.ones(2) / 2), of_domains(1, [3, 2], [4, 4]))
    after = mixer.update(state, of_domains(2, [5, 0], [8, 0], drawn_with=[1.0, 0.0]))
    assert after.reward[1] == state.reward[1]
    assert after.reward[0] != state.reward[0]
    assert np.isfinite(np.asarray(after.weights)).all()


def test_no_domain_falls_below_the_exploration_rate_after_thousands_of_steps():
    mixer = odm(min_exploration_rate=0.05)
    state = mixer.init(jnp.ones(4) / 4)
    update = jax.jit(mixer.update)
    for step in (10, 1000, 100_000):
        state = update(state, of_domains(step, [9.0, 1, 1, 1], [1] * 4))
    np.testing.assert_allclose(float(state.weights.min()), 0.05, rtol=2e-2)
    assert float(state.weights[0]) > 0.8


def test_many_domains_do_not_collapse_to_uniform():
    """The peer's default exploration rate makes 34 domains or more uniform; here it is refused."""
    with pytest.raises(InputError, match=r"min_exploration_rate = 0.03: must be in \[0, 1/K\)"):
        registry.checked("mixer", odm(variant="dataflex").init, jnp.ones(34) / 34)
    mixer = odm()
    state = mixer.update(mixer.init(jnp.ones(40) / 40), of_domains(5000, np.linspace(1, 4, 40), [1] * 40))
    assert float(state.weights.max()) > 2 * float(state.weights.min())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("alpha", 1.0, "alpha"),
        ("reward", "test", "training, validation"),
        ("variant", "exp4", "official, paper"),
        ("reward_scale", 0.0, "reward_scale"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(option, value, message):
    with pytest.raises(ValueError, match=message):
        odm(**{option: value})


def test_initial_proportions_override_the_natural_ones():
    natural = jnp.asarray([0.7, 0.2, 0.1])
    np.testing.assert_allclose(odm().init(natural).weights, natural)
    np.testing.assert_allclose(odm(initial_proportions=(1, 1, 2)).init(natural).weights, [0.25, 0.25, 0.5])
    np.testing.assert_allclose(odm(initial_proportions="uniform").init(natural).weights, 1 / 3, rtol=1e-6)


# The PyTorch peer's mixer (dataflex 1.1.0) in its own loop: three domains, no warm-up, defaults of the "dataflex"
# variant; each step's loss is credited to one domain, and the next proportions are the weights after the step before.
PEER_INITIAL = [0.5, 0.3, 0.2]
PEER_LOSSES = [
    8.491968, 8.775483, 2.102944, 8.045481, 8.868365, 8.700471,
    3.041348, 8.808402, 8.229549, 7.756617, 5.359915, 3.62661,
]  # fmt: skip
PEER_DOMAINS = [0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 2, 2]
PEER_WEIGHTS = {
    1: [0.33333333, 0.33333333, 0.33333333],
    6: [0.5024569, 0.24877155, 0.24877155],
    9: [0.20434111, 0.59131777, 0.20434111],
    12: [0.6315039, 0.19072694, 0.17776916],
}


def test_the_dataflex_variant_replays_the_peers_recorded_weights():
    mixer = odm(variant="dataflex")
    state = mixer.init(jnp.asarray(PEER_INITIAL))
    for step, (loss, domain) in enumerate(zip(PEER_LOSSES, PEER_DOMAINS, strict=True), 1):
        seen = np.arange(3) == domain
        state = mixer.update(state, of_domains(step, loss * seen, seen, drawn_with=state.weights))
        if step in PEER_WEIGHTS:
            np.testing.assert_allclose(state.weights, PEER_WEIGHTS[step], atol=2e-5)
