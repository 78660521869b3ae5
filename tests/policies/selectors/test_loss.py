"""The loss selector against a float64 transcription and the peer's recorded probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies import Evidence
from dataflex_jax.policies.selectors.loss import BANDS, loss, probabilities
from tests.helpers.fake_signals import FakeRows, FakeSignals, request


def transcription(losses, focus, quantiles, focus_weight, temperature):
    """The probabilities in float64."""
    losses = np.asarray(losses, np.float64)
    finite = losses[np.isfinite(losses)]
    q1, q2 = np.quantile(finite, quantiles)
    p = np.zeros(len(losses))
    for i, value in enumerate(losses):
        if np.isfinite(value):
            band = "low" if value <= q1 else "medium" if value <= q2 else "high"
            p[i] = (focus_weight if band == focus else 1.0) ** (1 / temperature)
    return p / p.sum()


@pytest.mark.parametrize("focus", BANDS)
@pytest.mark.parametrize(
    ("quantiles", "focus_weight", "temperature"),
    [((0.33, 0.66), 5.0, 1.0), ((0.1, 0.5), 0.3, 2.0), ((0.0, 1.0), 20.0, 0.25), ((0.4, 0.4), 5.0, 1.0)],
)
def test_equals_the_transcription(focus, quantiles, focus_weight, temperature):
    options = dict(focus=focus, quantiles=quantiles, focus_weight=focus_weight, temperature=temperature)
    compute = jax.jit(lambda losses: probabilities(losses, **options))
    rng = np.random.default_rng(1)
    losses = np.round(rng.gamma(2.0, 1.0, 211), 2).astype(np.float32)
    losses[[3, 50, 51]] = np.nan, np.inf, -np.inf
    p = np.asarray(compute(losses))
    np.testing.assert_allclose(p, transcription(losses, **options), rtol=2e-5)
    assert (p[[3, 50, 51]] == 0).all()


def test_equal_losses_are_drawn_uniformly_and_no_loss_never():
    np.testing.assert_allclose(probabilities(jnp.full(8, 2.0)), 1 / 8)
    np.testing.assert_array_equal(probabilities(jnp.full(3, jnp.nan)), 0)


# The PyTorch peer (dataflex 1.1.0): losses, and of each setting the probability outside and inside the band and how
# many losses the band has. It gives non-finite losses 1e-12 of a weight; here they have none.
PEER_LOSSES = [
    2.424433, 1.758733, 4.983144, 1.846898, 2.53916, np.nan, 1.843423, 2.765197, 2.887839, 2.348955, 3.315297,
    2.602072, 1.23107, 5.509941, 0.751203, 3.315288, 3.686038, np.nan, 2.010667, 1.140574, 2.491086, 1.433394,
    1.614217, 1.940894, 0.673704, 3.616022, 2.381212, 2.302565, 6.212001, 1.893332, 2.00096, 2.00096, 3.034295,
    0.868855, 3.884518, 4.431053, 1.452743, 2.113174, 1.331758, 2.632747, 1.897317, 3.391672, 1.438024, 1.314943,
    3.797038, 1.372436, 1.518653, 1.372183, 2.254914, 1.487224, 1.384994, 1.91149, 3.417413, 6.40317, 1.716258,
    1.202843, 1.27497, 0.624892, 2.02315, 4.746647, 2.25305, 2.150555, 3.142183, 1.518531, 1.643574, 1.587922,
    3.093154, 1.395836, 1.727847, 2.144494, 1.29019, 2.439962, 2.631372, 3.051603, 4.831564, 3.716791, 2.730537,
    1.68668, 1.855446, 3.175639, 2.101014, 1.398977, 1.936002, 3.479384, 2.463804, 2.576267, 1.332, 2.836628,
    2.343105, 3.780797, 1.160055, 2.319108, 4.458749, 1.891207, 0.593711, 3.353106, 1.480749, 5.304708, 1.147289,
    0.670567, 1.596832,
]  # fmt: skip
PEER_PROBABILITIES = [
    ("low", 1.0, 0.004329, 0.02164502, 33),
    ("low", 0.5, 0.00112233, 0.02805836, 33),
    ("medium", 1.0, 0.00440529, 0.02202643, 32),
    ("medium", 0.5, 0.0011534, 0.02883506, 32),
    ("high", 1.0, 0.00425532, 0.0212766, 34),
    ("high", 0.5, 0.0010929, 0.0273224, 34),
]


@pytest.mark.parametrize(("focus", "temperature", "outside", "inside", "count"), PEER_PROBABILITIES)
def test_equals_the_peers_recorded_probabilities(focus, temperature, outside, inside, count):
    p = np.asarray(probabilities(jnp.asarray(PEER_LOSSES), focus=focus, temperature=temperature))
    losses = np.array(PEER_LOSSES)
    ranks = np.argsort(np.argsort(losses))
    first = {"low": 0, "medium": 33, "high": 65}[focus]
    band = (first <= ranks) & (ranks < first + count) & np.isfinite(losses)
    np.testing.assert_allclose(p[band], inside, atol=1e-8)
    np.testing.assert_allclose(p[~band & np.isfinite(losses)], outside, atol=1e-8)
    np.testing.assert_array_equal(p[~np.isfinite(losses)], 0)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_choice_is_reproducible_and_mostly_of_the_band(replacement):
    losses = np.random.default_rng(0).gamma(2.0, 1.0, 3000)
    selector = loss(focus="medium", focus_weight=20.0, replacement=replacement)
    assert selector.replacement == replacement
    evidence, _ = selector.score({}, FakeSignals(FakeRows(losses=losses)), request())
    choose = jax.jit(selector.choose, static_argnums=2)
    first, again, other = (choose(evidence, request(seed=seed), 300) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert set(np.asarray(first.ids)) != set(np.asarray(other.ids))
    q1, q2 = np.quantile(losses, (0.33, 0.66))
    chosen = losses[np.asarray(first.ids)]
    assert ((q1 < chosen) & (chosen <= q2)).mean() > 0.8
    np.testing.assert_array_equal(first.scores, first.all_scores[first.ids])
    assert (len(set(np.asarray(first.ids))) < 300) == replacement


def test_candidates_without_a_loss_are_drawn_last():
    losses = Evidence(jnp.asarray([1.0, jnp.nan, 2.0, jnp.inf, 3.0]))
    for seed in range(20):
        assert set(np.asarray(loss().choose(losses, request(seed=seed), 3).ids)) == {0, 2, 4}
        assert set(np.asarray(loss(replacement=True).choose(losses, request(seed=seed), 9).ids)) <= {0, 2, 4}


@pytest.mark.parametrize(
    ("option", "value"),
    [("focus", "hard"), ("quantiles", (0.6, 0.3)), ("quantiles", (0.5,)), ("focus_weight", 0.0), ("temperature", 0.0)],
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        loss(**{option: value})
