"""Fixed proportions and those of stages, and the values that no mixer takes for proportions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.mixers.static import static
from tests.helpers import policy_runs, tiny
from tests.helpers.observations import of_domains

NATURAL = jnp.asarray([0.6, 0.3, 0.1])


def test_static_keeps_its_proportions():
    mixer = static(proportions=(2, 1, 1))
    state = mixer.init(NATURAL)
    after = mixer.update(state, of_domains(1, [9, 1, 1], [1, 1, 1]))
    np.testing.assert_array_equal(mixer.sampling_weights(after), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(static().init(NATURAL).weights, NATURAL)
    np.testing.assert_allclose(static(proportions="uniform").init(NATURAL).weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ((1, 1), r"proportions = \(1, 1\): has 2 entries; one for each of the 3"),
        ((1, -1, 1), "must be a finite number >= 0"),
        ((1, float("nan"), 1), "must be a finite number >= 0"),
        ((0, 0, 0), "at least one entry must be > 0"),
        ("even", "proportions = 'even': must be a tuple of numbers or \"uniform\""),
    ],
)
def test_impossible_proportions_are_refused(proportions, message):
    with pytest.raises(ValueError, match=message):
        static(proportions=proportions).init(NATURAL)


STAGES = ((0, (6, 3, 1)), (4, "uniform"), (10, (0, 1, 3)), (11, "natural"))


def weights_after(step, **options):
    mixer = static(stages=STAGES, **options)
    state = jax.jit(mixer.update)(mixer.init(NATURAL), of_domains(step, [9, 1, 1], [1, 1, 1]))
    return np.asarray(mixer.sampling_weights(state))


def expected(step, interpolate):
    """The stages' weights in float64, by the formula."""
    numbers = {"uniform": (1, 1, 1), "natural": (6, 3, 1)}
    table = [(s, np.array(numbers.get(w, w), np.float64)) for s, w in STAGES]
    table = [(s, w / w.sum()) for s, w in table]
    i = max(i for i, (s, _) in enumerate(table) if s <= step)
    s, w = table[i]
    if not interpolate or i + 1 == len(table):
        return w
    after, then = table[i + 1]
    return w + (step - s) / (after - s) * (then - w)


@pytest.mark.parametrize("interpolate", [False, True])
def test_stages_are_those_of_the_last_step_or_between_two(interpolate):
    mixer = static(stages=STAGES, interpolate=interpolate)
    np.testing.assert_allclose(mixer.sampling_weights(mixer.init(NATURAL)), expected(0, interpolate), rtol=1e-6)
    for step in range(1, 15):
        np.testing.assert_allclose(
            weights_after(step, interpolate=interpolate), expected(step, interpolate), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ((0, (1, 1)), (5, (1, 1)), (5, (1, 2)))}, "stages = .*: must be .step, weights. pairs whose steps"),
        ({"stages": ((0, (1, 1)), (5, (1, 1)), (3, (1, 2)))}, "stages = .*: must be .step, weights. pairs whose steps"),
        ({"stages": ((1, (1, 1)),)}, "stages = .*: must be .step, weights. pairs whose steps increase from 0"),
        ({"stages": ()}, "stages = .*: must be .step, weights. pairs whose steps increase from 0"),
        ({"stages": ((0, (1, 1)),), "proportions": (1, 1)}, r"proportions = \(1, 1\): must be None beside stages"),
        ({"interpolate": True}, "interpolate = True: must be False without stages"),
    ],
)
def test_stages_out_of_order_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        static(**options)


@pytest.mark.parametrize("weights", [(1, 1), (0, 0, 0), "even", (1, "a", 1)])
def test_weights_of_a_stage_are_proportions(weights):
    with pytest.raises(ValueError, match="stages = "):
        static(stages=((0, "uniform"), (5, weights))).init(NATURAL)


def test_a_run_draws_by_its_stages_and_goes_on_with_them(tmp_path):
    root = tiny.write_domains(tmp_path / "domains", characters=3000)
    stages = ((0, (1, 0, 0)), (3, (0, 1, 0)), (7, (0, 0, 1)))
    made = policy_runs.resumable(root, tmp_path, "mixer", "static", mixer__stages=stages, data__lag=1)
    _, policy = policy_runs.assert_goes_on(made, tmp_path)
    names = list(policy[0]["sampling_weights"])
    drawn = [max(names, key=line["observed"]["drawn_with"].get) for line in policy]
    assert drawn == [names[0]] * 4 + [names[1]] * 4 + [names[2]] * 2
    assert policy[-1]["sampling_weights"] == {names[0]: 0.0, names[1]: 0.0, names[2]: 1.0}
