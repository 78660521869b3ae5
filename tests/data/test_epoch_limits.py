"""`data.max_epochs`: how many rows each domain gives, and what the sampler makes of it."""

import numpy as np
import pytest

from dataflex_jax import config as configuration
from dataflex_jax.configs import base
from dataflex_jax.data import sampler as s
from dataflex_jax.data.epoch_limits import check_room, most_rows
from dataflex_jax.errors import InputError, TrainingError
from tests.helpers import policy_runs, tiny

ROWS = {"a": 10, "b": 25, "c": 7}
EVEN = np.ones(3) / 3


@pytest.mark.parametrize(
    ("epochs", "most"),
    [
        (None, None),
        (2, (20, 50, 14)),
        (0.3, (3, 7, 2)),
        ((1, 2, 3.5), (10, 50, 24)),
        ((("c", 2), ("a", 1.0)), (10, 2**31 - 1, 14)),
    ],
)
def test_epochs_are_rows_of_each_domain(epochs, most):
    assert most_rows(epochs, ROWS, EVEN) == most


def test_a_domain_at_proportion_0_gives_none():
    assert most_rows(2, ROWS, np.array([0.5, 0, 0.5])) == (20, 0, 14)


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ((1, 2), r"^config.data.max_epochs = \(1, 2\): has 2 entries; one for each of the 3 domains is needed$"),
        ((("d", 1),), "^config.data.max_epochs: 'd' is none of the domains a, b, c$"),
        (0.01, "^config.data.max_epochs = 0.01: 0.01 epochs of the 10 rows of a are no row$"),
    ],
)
def test_what_does_not_fit_the_domains_is_refused(epochs, message):
    with pytest.raises(InputError, match=message):
        most_rows(epochs, ROWS, EVEN)


def test_a_run_that_its_domains_cannot_fill_is_refused():
    most = most_rows(2, ROWS, EVEN)
    check_room(2, most, 84)
    with pytest.raises(
        InputError, match=r"^config.data.max_epochs = 2: the domains give at most 84 rows, and the run n"
    ):
        check_room(2, most, 85)


@pytest.mark.parametrize("value", [0, -1, (1, 0), "many", (), ((1, 2), 3), {"a": 0}, True])
def test_other_values_are_refused(value):
    config = base.get_config().unlock()
    config.data.max_epochs = value
    with pytest.raises(
        InputError, match=r"^config.data.max_epochs = .*: must be a number > 0, a tuple of one for each"
    ):
        configuration.validate(config)


def test_numbers_by_name_and_a_selector_with_and_without_a_mixer():
    config = base.get_config("selector=loss,mixer=static")
    config.data.max_epochs = {"a": 2}
    configuration.validate(config)
    assert config.data.max_epochs == (("a", 2),)
    config = base.get_config("selector=loss")
    config.data.max_epochs = 2.0
    with pytest.raises(InputError, match=r"^config.data.max_epochs = 2.0: needs a mixer beside a selector or an order"):
        configuration.validate(config)


def drawn(sampler, weights, steps):
    state = s.SamplerState(0, np.zeros(len(weights), np.int64), np.array(weights))
    plans, exhausted = [], []
    for _ in range(steps):
        plan, after = sampler.plan(state)
        exhausted.append(sampler.exhausted(state, after))
        plans.append(plan)
        state = after
    return plans, exhausted, state


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_no_domain_gives_more_than_it_may_and_the_others_share_in_proportion(draw):
    most = (30, 10_000, 10_000)
    plans, exhausted, state = drawn(s.Sampler(1, 16, draw, most=most), [0.5, 0.375, 0.125], 100)
    assert state.cursors[0] == 30
    assert state.cursors.sum() == 1600
    at = next(i for i, domains in enumerate(exhausted) if domains)
    assert [domains for domains in exhausted if domains] == [(0,)]
    for plan in plans[: at + 1]:
        np.testing.assert_array_equal(plan.drawn_with, [0.5, 0.375, 0.125])
    for plan in plans[at + 1 :]:
        np.testing.assert_allclose(plan.drawn_with, [0, 0.75, 0.25])
    counts = np.stack([np.bincount(plan.domains, minlength=3) for plan in plans[at + 1 :]])
    if draw == "systematic":
        assert (np.abs(counts - [0, 12, 4]) <= 1).all()
    np.testing.assert_allclose(counts.mean(0), [0, 12, 4], atol=1)


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_all_rows_that_there_are_come_and_then_no_more(draw):
    most = (13, 5, 14)
    plans, exhausted, state = drawn(s.Sampler(3, 8, draw, most=most), [0.6, 0.3, 0.1], 4)
    assert state.cursors.tolist() == list(most)
    for domain, count in enumerate(most):
        positions = np.concatenate([plan.positions[plan.domains == domain] for plan in plans])
        assert sorted(positions.tolist()) == list(range(count))
    assert sorted(number for domains in exhausted for number in domains) == [0, 1, 2]
    with pytest.raises(TrainingError, match=r"^at step 5 all domains with a weight have given .*; 8 rows are missing$"):
        s.Sampler(3, 8, draw, most=most).plan(state)


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_limits_that_are_not_reached_change_no_draw(draw):
    weights = [0.6, 0.3, 0.1]
    free, _, _ = drawn(s.Sampler(3, 8, draw), weights, 20)
    limited, exhausted, _ = drawn(s.Sampler(3, 8, draw, most=(1000, 1000, 1000)), weights, 20)
    assert not any(exhausted)
    for one, other in zip(free, limited, strict=True):
        np.testing.assert_array_equal(one.domains, other.domains)
        np.testing.assert_array_equal(one.positions, other.positions)


def test_a_run_says_when_a_domain_has_given_its_epochs_and_goes_on_to_the_bit(tmp_path):
    root = tiny.write_domains(tmp_path / "domains", characters=3000)
    epochs = (("digits", 0.06), ("vowels", 0.2))
    made = policy_runs.resumable(root, tmp_path, "mixer", "odm", data__max_epochs=epochs)
    metrics, policy = policy_runs.assert_goes_on(made, tmp_path)
    said = {name: line["step"] for line in policy for name in line.get("exhausted", ())}
    assert said.keys() == {"digits", "vowels"}
    assert {line["policy"] for line in policy if "exhausted" in line} == {"max_epochs"}
    after = [line for line in policy if "observed" in line and line["step"] > said["digits"] + 1]
    assert after
    assert all(
        line["observed"]["drawn_with"]["digits"] == line["observed"]["domain_rows"]["digits"] == 0 for line in after
    )
    assert metrics[-1]["domain_epochs"]["digits"] <= 0.06
    assert metrics[-1]["domain_epochs"]["vowels"] <= 0.2
