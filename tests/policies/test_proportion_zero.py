"""A domain at proportion 0 is never drawn, whatever the mixer and its variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.policies import DomainGradients, registry
from dataflex_jax.policies.active import active_policies
from dataflex_jax.policies.base import Mixer
from dataflex_jax.policies.common import scaling_law
from dataflex_jax.policies.mixers.ado import preference
from dataflex_jax.policies.mixers.odm import odm
from dataflex_jax.policies.proportions import only, starting_proportions
from tests.helpers import fake_signals, observations

NATURAL = jnp.asarray([0.5, 0.0, 0.3, 0.2])
DRAWN = np.array([True, False, True, True])


@pytest.fixture(autouse=True)
def _rough_fits(monkeypatch):
    monkeypatch.setattr(scaling_law, "_ITERATIONS", 8)


FIELDS = {
    "static": ({"proportions": (1, 2, 3, 4)}, {"proportions": "uniform"}, {}),
    "random": ({},),
    "odm": (
        *({"variant": v, "initial_proportions": "uniform"} for v in ("official", "paper", "dataflex", "exp3")),
        {"min_exploration_rate": 0.1},
    ),
    "doremi": ({"loss_norm": "official"}, {"loss_norm": "paper", "sampling": "natural"}, {"sampling": (1, 1, 1, 1)}),
    "ado": ({"ignore": 0, "smoothing": 1, "history": 16},),
    "doge": ({"c": 0.2}, {"ema": 0.5, "initial_proportions": (1, 1, 1, 1)}),
    "loss_softmax": ({}, {"smoothing": 0.5}),
    "dynamic_moe": ({}, {"initial_proportions": (1, 1, 1, 1)}),
}


def at_work(name, natural=NATURAL, **fields):
    config = base.get_config(f"mixer={name}")
    if name == "doremi":
        fields = fields | {"reference": "a run"}
    for field, value in fields.items():
        with config.mixer.ignore_type():
            config.mixer[field] = value
    return active_policies(config).drawing(np.asarray(natural)).mixer.policy


def trajectory(policy, steps):
    """The states of a run in which only what is drawn is seen."""
    rng = np.random.default_rng(0)
    update = jax.jit(policy.update)
    states = [policy.init(NATURAL)]
    for step in range(1, steps + 1):
        rows = np.where(DRAWN, rng.integers(1, 4, 4), 0)
        token_losses = rng.uniform(1, 5, (rows.sum(), 3))
        domains = np.repeat(np.arange(4), rows)
        reference = token_losses - rng.uniform(-1, 1, token_losses.shape)
        seen = observations.of_tokens(step, token_losses, reference, np.ones_like(token_losses), domains, 4)
        state = states[-1]
        if policy.refresh is not None and step in (2, 11):
            gradients = rng.normal(size=(4, 6))
            signals = fake_signals.FakeSignals(
                domain_gradients=DomainGradients(jnp.asarray(gradients @ gradients.T), None, jnp.float32(1e-2)),
                held_out=fake_signals.FakeRows(gates=np.square(gradients), groups=np.arange(4)),
            )
            state = policy.refresh(state, signals)
        states.append(update(state, seen._replace(drawn_with=policy.sampling_weights(state))))
    return states


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, fields) for name in registry.names("mixer") for fields in FIELDS.get(name, ({},))],
)
def test_its_weight_stays_0_and_the_others_sum_to_1(name, fields):
    policy = at_work(name, **fields)
    states = trajectory(policy, 12 if policy.refresh else 8)
    for state in states:
        weights = np.asarray(policy.sampling_weights(state))
        assert weights[1] == 0
        assert (weights[DRAWN] > 0).all()
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        if policy.loss_weights is not None:
            of_loss = np.asarray(policy.loss_weights(state))
            assert of_loss[1] == 0 < of_loss[DRAWN].min()
        if policy.average is not None:
            assert np.asarray(policy.average(state))[1] == 0
    if name not in ("static", "doremi"):
        assert len({tuple(np.asarray(policy.sampling_weights(state))) for state in states}) > 1


def test_the_others_keep_their_proportions():
    plain, policy = odm(initial_proportions="uniform"), at_work("odm", initial_proportions="uniform")
    states = trajectory(policy, 3)
    for state in states[1:]:
        raw = np.where(DRAWN, np.asarray(plain.sampling_weights(state), np.float64), 0)
        np.testing.assert_allclose(policy.sampling_weights(state), raw / raw.sum(), rtol=1e-6)


def test_without_a_zero_a_mixer_is_as_it_was_to_the_bit():
    natural = jnp.asarray([0.4, 0.1, 0.3, 0.2])
    plain, policy = odm(), at_work("odm", natural)
    state = policy.init(natural)
    np.testing.assert_array_equal(policy.sampling_weights(state), plain.sampling_weights(plain.init(natural)))
    uneven = jnp.asarray([0.1, 0.2, 0.30000001, 0.4]) / 3
    np.testing.assert_array_equal(only(uneven, jnp.ones(4, bool)), uneven)


def test_a_mixer_of_a_user_that_gives_all_to_it_draws_the_others_alike(monkeypatch):
    registry.names("mixer")
    monkeypatch.setitem(registry._FACTORIES, "mixer", dict(registry._FACTORIES["mixer"]))

    @registry.register_mixer("users_only_second")
    def _():
        return Mixer(lambda natural: jnp.eye(4)[1], lambda state, seen: state, lambda state: state)

    policy = at_work("users_only_second")
    np.testing.assert_allclose(policy.sampling_weights(policy.init(NATURAL)), DRAWN / 3)


def test_starting_proportions_leave_it_out():
    np.testing.assert_allclose(starting_proportions("x", "uniform", NATURAL), DRAWN / 3)
    np.testing.assert_allclose(starting_proportions("x", (1, 5, 2, 1), NATURAL), [0.25, 0, 0.5, 0.25])
    with pytest.raises(ValueError, match=r"^x = \(0, 1, 0, 0\): must be > 0 for a domain that the run draws from$"):
        starting_proportions("x", (0, 1, 0, 0), NATURAL)
    policy = at_work("static", proportions=(0, 1, 0, 0))
    with pytest.raises(InputError, match=r"config.mixer.proportions = \(0, 1, 0, 0\): must be > 0 for a domain"):
        registry.checked("mixer", policy.init, NATURAL)


def test_ado_needs_no_law_of_it():
    policy = at_work("ado", ignore=0, smoothing=1, history=16)
    state = trajectory(policy, 12)[-1]
    assert np.asarray(state.fitted).tolist() == [True, False, True, True]
    assert (np.asarray(state.weights) != np.asarray(NATURAL))[DRAWN].all()
    rho = np.asarray(preference(state.law, state.samples, state.prior, state.drawn))
    assert rho[1] == 0
    assert rho[DRAWN].min() >= 0.01 / (1 + 4 * 0.01)


@pytest.mark.parametrize("name", ["odm", "doremi", "ado", "doge", "loss_softmax", "random", "dynamic_moe"])
def test_a_resume_may_set_one_to_0_and_back(name):
    everything = jnp.asarray([0.4, 0.1, 0.3, 0.2])
    before, now = at_work(name, everything), at_work(name)
    old = before.init(everything)
    adapted = now.on_resume(old, now.init(NATURAL)) if now.on_resume else now.init(NATURAL)
    weights = np.asarray(now.sampling_weights(adapted))
    assert weights[1] == 0
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    back = before.init(everything)
    if now.on_resume:
        back = before.on_resume(trajectory(now, 1 if name == "ado" else 2)[-1], back)
    again = np.asarray(before.sampling_weights(back))
    assert (again > 0).all()
    np.testing.assert_allclose(again.sum(), 1, rtol=1e-6)
