"""The loss weighter against a float64 transcription, the spec's check values and the peer's recorded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.weighters.loss import STRATEGIES, loss
from tests.helpers.observations import of_rows, recorded


def transcription(losses, strategy, delta, r):
    """The formulas in float64; weights that sum to 1."""
    low, high = losses.min(), losses.max()
    if high == low:
        return np.full(len(losses), 1 / len(losses))
    h = 2 * delta * losses / (high - low) - delta * (high + low) / (high - low)
    f = {
        "linupper": np.minimum(h + delta, delta),
        "quadratic": 1 - h**2 / delta**2,
        "extremes": np.abs(h),
        "uniform": 0 * h,
        "linear": h,
    }[strategy]
    return np.exp(f / r) / np.exp(f / r).sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("delta", "r"), [(1.0, 1.0), (0.4, 0.3), (2.5, 4.0)])
def test_equals_the_transcription(strategy, delta, r):
    losses = np.random.default_rng(0).uniform(0.1, 9, 13)
    weighter = loss(strategy=strategy, delta=delta, r=r)
    weights = jax.jit(weighter.weigh)(weighter.init(4), of_rows(losses))
    np.testing.assert_allclose(weights, 13 * transcription(losses, strategy, delta, r), rtol=2e-5)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("linupper", [0.123681, 0.203916, 0.336201, 0.336201]),
        ("quadratic", [0.1463, 0.309717, 0.397684, 0.1463]),
        ("extremes", [0.336201, 0.203916, 0.123681, 0.336201]),
        ("uniform", [0.25] * 4),
    ],
)
def test_check_values(strategy, expected):
    weights = loss(strategy=strategy).weigh((), of_rows([1, 2, 3, 5]))
    np.testing.assert_allclose(weights, 4 * np.array(expected), atol=4e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("losses", [[2.5, 2.5, 2.5], [0.0, 0.0], [7.0]])
def test_equal_losses_and_single_rows_are_the_plain_loss(strategy, losses):
    weigh = loss(strategy=strategy).weigh
    np.testing.assert_array_equal(weigh((), of_rows(losses)), np.ones(len(losses)))
    gradient = jax.grad(lambda x: weigh((), of_rows(losses)._replace(losses=x)).sum())(jnp.asarray(losses))
    assert np.isfinite(gradient).all()


def test_weights_do_not_depend_on_the_scale_and_offset_of_the_losses():
    losses = np.random.default_rng(1).uniform(1, 5, 8)
    weigh = loss(strategy="quadratic", r=0.5).weigh
    np.testing.assert_allclose(weigh((), of_rows(3 * losses + 2)), weigh((), of_rows(losses)), rtol=2e-5)


def test_rows_without_a_token_in_the_loss_count_for_nothing():
    mask = [[1, 1], [0, 0], [1, 0], [1, 1]]
    weights = loss().weigh((), of_rows([4.0, 0.0, 2.0, 3.0], mask=mask))
    assert weights[1] == 0
    np.testing.assert_allclose(weights[np.array([0, 2, 3])], loss().weigh((), of_rows([4.0, 2.0, 3.0])), rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_length_weighted_multiplies_by_each_rows_share_of_tokens(strategy):
    rng = np.random.default_rng(2)
    losses, tokens = rng.uniform(1, 5, 6), np.array([1, 8, 3, 5, 2, 8])
    mask = np.arange(8) < tokens[:, None]
    weights = loss(strategy=strategy, length_weighted=True).weigh((), of_rows(losses, mask=mask))
    expected = transcription(losses, strategy, 1.0, 1.0) * tokens
    np.testing.assert_allclose(weights, 6 * expected / expected.sum(), rtol=2e-5)
    if strategy == "uniform":
        token_mean = (losses * tokens).sum() / tokens.sum()
        np.testing.assert_allclose((weights * losses).mean(), token_mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", 5.25), ("cosine", 5.25), ("exponential", np.sqrt(10 * 0.5))]
)
def test_the_temperature_goes_from_r_initial_to_r(schedule, middle):
    losses = np.array([1.0, 2, 4, 7])
    weighter = loss(r=0.5, r_schedule=schedule, r_initial=10.0, r_steps=20)
    weigh = jax.jit(weighter.weigh)
    for since_warmup, r in ((1, 10.0), (11, middle), (21, 0.5), (500, 0.5)):
        weights = weigh((), of_rows(losses, since_warmup=since_warmup))
        np.testing.assert_allclose(weights, 4 * transcription(losses, "linupper", 1.0, r), rtol=3e-5)


def test_the_effective_sample_size_falls_with_r():
    losses = np.random.default_rng(3).uniform(1, 5, 32)

    def effective(r):
        weights = np.asarray(loss(r=r).weigh((), of_rows(losses)), np.float64)
        return weights.sum() ** 2 / (weights**2).sum()

    sizes = [effective(r) for r in (100.0, 1.0, 0.3, 0.1)]
    assert sizes[0] > 31.9
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("linupper", "linupper"), ("quadratic", "quadratic"), ("extremes", "extremes"), ("linear", "uniform")],
)
@pytest.mark.parametrize("delta", [1.0, 0.5])
def test_the_peers_recorded_weights(mine, theirs, delta):
    numbers = recorded("weighters_core.npz")
    prefix = f"loss/{theirs}_{delta}"
    weigh = loss(strategy=mine, delta=delta).weigh
    for losses, weights, weighted in zip(
        numbers["losses"], numbers[f"{prefix}/weights"], numbers[f"{prefix}/weighted"], strict=True
    ):
        ours = np.asarray(weigh((), of_rows(losses)))
        np.testing.assert_allclose((ours * losses).mean(), weighted, rtol=1e-5)
        np.testing.assert_allclose(ours / len(losses), weights, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "linuper"}, "^strategy = 'linuper': must be one of linupper"),
        ({"delta": 0.0}, "^delta = 0.0: must be > 0"),
        ({"r": -1.0}, "^r = -1.0: must be > 0"),
        ({"r_schedule": "step"}, "^r_schedule = 'step': must be one of constant"),
        ({"r_schedule": "linear", "r_steps": 5}, "^r_initial = None: must be > 0"),
        ({"r_schedule": "linear", "r_initial": 5.0}, "^r_steps = None: must be >= 1"),
        ({"r_initial": 5.0}, "^r_initial = 5.0: must be None but for an r_schedule of linear, cosine"),
        ({"r_steps": 5}, "^r_steps = 5: must be None but for an r_schedule of linear, cosine"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        loss(**options)
