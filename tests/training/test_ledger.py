"""The books of a run against a plain transcription of them."""

import numpy as np
import pytest

from dataflex_jax.data.sampler import Sampler, SamplerState
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.training.ledger import Done, Position, Publishing, advanced, counts_nothing, fault

NAMES = ["code", "digits", "vowels"]
START = np.array([0.5, 0.3, 0.2])


def random_step(rng, step):
    rows = rng.integers(0, 5, 3)
    weights = rng.dirichlet(np.ones(3))
    values = {
        "loss": np.float32(rng.uniform(1, 5)),
        "grad_norm": np.float32(rng.uniform(0, 2)),
        "tokens": np.float32(rng.integers(0, 500)),
        "domain_rows": rows,
        "domain_loss": rng.uniform(1, 5, 3).astype(np.float32),
        "mixer": {"alpha": weights.astype(np.float32), "count": np.int32(step)},
        "sampling_weights": weights,
    }
    return Done(step, rows, values)


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("schedule", [Schedule(2, 3, -1), Schedule(0, 1, 4), Schedule(1, 2, 0)])
def test_what_is_counted_and_what_is_drawn_with(lag, schedule):
    """A step is planned as soon as the one `min(lag, 1)` steps before it has been read, as in the loop."""
    rng, publishing = np.random.default_rng(0), Publishing(schedule, lag)
    position = Position(SamplerState(0, np.zeros(3, np.int64), START), 10, np.array([1, 2, 3]))
    sampler, done, drawn_with = Sampler(seed=0, batch_size=8, draw="systematic"), [], []
    for step in range(1, 16):
        plan, after = sampler.plan(position.sampler)
        drawn_with.append(plan.drawn_with)
        position = position._replace(sampler=after)
        done.append(random_step(rng, step))
        read = step - min(lag, 1)
        if read >= 1:
            position = advanced(position, done[read - 1], publishing)

    for step in range(1, 16):
        expected = START
        for update, decided in enumerate(range(schedule.warmup_step, step, schedule.update_step)):
            limited = schedule.update_times >= 0 and update >= schedule.update_times
            if decided >= 1 and decided + 1 + lag <= step and not limited:
                expected = done[decided - 1].values["sampling_weights"]
        np.testing.assert_allclose(drawn_with[step - 1], expected, rtol=1e-12, err_msg=f"step {step}")
    read = done[: 15 - min(lag, 1)]
    assert position.tokens_seen == 10 + sum(int(step.values["tokens"]) for step in read)
    assert position.rows_seen.tolist() == [
        first + sum(int(step.rows[k]) for step in read) for k, first in enumerate([1, 2, 3])
    ]


def test_the_step_that_weights_take_effect_in():
    publishing = Publishing(Schedule(2, 3, 2), lag=1)
    assert [publishing.effective_step(step) for step in range(1, 10)] == [
        None,
        4,
        None,
        None,
        7,
        None,
        None,
        None,
        None,
    ]


def changed(**values):
    done = random_step(np.random.default_rng(1), 7)
    return done._replace(values=done.values | {"domain_rows": np.array([3, 0, 5])} | values)


def test_what_is_finite_has_no_fault():
    assert fault(changed(), NAMES, "odm") is None
    assert fault(changed(mixer=()), NAMES, "static") is None
    assert fault(changed(mixer={"count": np.int32(3)}), NAMES, "odm") is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_fault_says_what_at_which_step_with_which_rows(bad):
    rows = "at step 7; rows in the batch: 3 of code, 5 of vowels"
    for name in ("loss", "grad_norm"):
        assert fault(changed(**{name: np.float32(bad)}), NAMES, "odm") == f"{name} is {bad} {rows}"
    # The loss comes first.
    assert fault(changed(loss=bad, grad_norm=bad), NAMES, "odm").startswith("loss is ")
    weights = np.array([0.5, bad, 0.25])
    described = f"{{'code': 0.5, 'digits': {bad}, 'vowels': 0.25}}"
    expected = f"mixer odm: not all finite, sampling_weights = {described} {rows}"
    assert fault(changed(sampling_weights=weights), NAMES, "odm") == expected
    expected = f"mixer odm: not all finite, mixer = {{'alpha': {described}, 'count': 2}} {rows}"
    assert fault(changed(mixer={"alpha": weights, "count": np.int32(2)}), NAMES, "odm") == expected


@pytest.mark.parametrize(
    ("weights", "wrong"),
    [((0.7, 0.7, 0.1), "the sum is 1.5, not 1"), ((1.2, -0.2, 0.0), "-0.2 is negative")],
)
def test_a_mixer_that_returns_no_distribution_is_named(weights, wrong):
    described = str(dict(zip(NAMES, weights, strict=True)))
    expected = f"mixer mine: no distribution ({wrong}), sampling_weights = {described} at step 7; rows in"
    assert fault(changed(sampling_weights=np.array(weights)), NAMES, "mine").startswith(expected)


@pytest.mark.parametrize(
    ("name", "value"), [("example_weight_min", -0.5), ("token_weight_min", -0.01), ("example_weight_max", np.inf)]
)
def test_a_weighter_that_returns_negative_or_infinite_weights_is_named(name, value):
    expected = f"weighter 'mine': a weight of the loss is {value}, not finite and >= 0, at step 7; rows"
    assert fault(changed(**{name: value}), NAMES, "odm", "weighter 'mine'").startswith(expected)
    assert fault(changed(**{name: 0.5}), NAMES, "odm", "weighter 'mine'") is None


def test_a_loss_that_is_not_finite_itself_is_not_the_weighters_fault():
    losses = np.array([2.0, np.nan, 1.0])
    found = fault(changed(loss=np.nan, domain_loss=losses, example_weight_min=np.nan), NAMES, "odm", "weighter 'loss'")
    assert found.startswith("loss is nan at step 7")


def test_a_step_of_which_nothing_counts():
    assert counts_nothing(changed(loss=np.float32(0)))
    assert not counts_nothing(changed())
    assert not counts_nothing(changed(loss=np.float32(0), domain_loss=np.zeros(3)))
