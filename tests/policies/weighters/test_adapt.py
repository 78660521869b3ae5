"""ADAPT against a float64 transcription and the peer's recorded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies.weighters.adapt import NORMALIZATIONS, adapt
from tests.helpers.fake_signals import FakeRows, FakeSignals
from tests.helpers.hidden_states import pooled, random_hidden
from tests.helpers.observations import of_rows, recorded


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("tau", "clip"), [(1.0, None), (0.2, 0.6)])
def test_equals_the_transcription(normalize, tau, clip):
    target_hidden, target_mask = random_hidden(1)
    targets = FakeSignals(targets=FakeRows(hidden=target_hidden, mask=target_mask))
    hidden, mask = random_hidden(2)
    weighter = adapt(tau=tau, clip=clip, normalize=normalize)
    assert not np.asarray(weighter.init(6).anchor).any()
    state = weighter.refresh(weighter.init(6), targets)
    embeddings = weighter.embed(jnp.asarray(hidden), jnp.asarray(mask))
    weights = jax.jit(weighter.weigh)(state, of_rows(np.ones(5), embeddings=embeddings))

    phi = pooled(hidden, mask, "position_weighted_mean")
    anchors = pooled(target_hidden, target_mask, "position_weighted_mean")
    expected = 1 / (1 + np.exp(-(phi @ anchors.T).mean(1) / tau))
    if clip is not None:
        assert (expected > clip).any()
        expected = np.minimum(expected, clip)
    expected = {"batch": expected, "sum": 5 * expected, "mean": expected / expected.mean()}[normalize]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_rows_like_the_targets_weigh_more_than_others():
    rng = np.random.default_rng(3)
    direction, other = np.eye(6)[0], np.eye(6)[1]

    def rows(about):
        return 3 * about + 0.3 * rng.normal(size=(8, 4, 6))

    weighter = adapt(tau=0.1)
    targets = FakeRows(hidden=rows(direction), mask=np.ones((8, 4)))
    state = weighter.refresh(weighter.init(6), FakeSignals(targets=targets))
    hidden = np.concatenate([rows(direction), rows(other)])
    embeddings = weighter.embed(jnp.asarray(hidden), jnp.ones((16, 4)))
    weights = weighter.weigh(state, of_rows(np.ones(16), embeddings=embeddings))
    assert weights[:8].min() > weights[8:].max()


def test_no_target_set_is_refused():
    weighter = adapt()
    with pytest.raises(InputError, match=r"^weighter 'adapt' needs a target set"):
        weighter.refresh(weighter.init(6), FakeSignals())


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_peers_recorded_weights(tau):
    numbers = recorded("weighters_core.npz")
    table = numbers["embed_table"]
    targets = FakeRows(hidden=table[numbers["eval_input_ids"]], mask=numbers["eval_attention_mask"])
    weighter = adapt(tau=tau, normalize="sum")
    state = weighter.refresh(weighter.init(table.shape[1]), FakeSignals(targets=targets))
    mask = jnp.asarray(numbers["train_attention_mask"])
    embeddings = weighter.embed(jnp.asarray(table[numbers["train_input_ids"]]), mask)
    np.testing.assert_allclose(embeddings, numbers["adapt/train_emb"], atol=1e-6)
    losses = numbers["emb_losses"]
    weights = weighter.weigh(state, of_rows(losses, embeddings=embeddings))
    np.testing.assert_allclose(weights / len(losses), numbers[f"adapt_tau{tau}/weights"], rtol=1e-5)
    np.testing.assert_allclose((weights * losses).mean(), numbers[f"adapt_tau{tau}/weighted"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "^tau = 0.0: must be > 0"),
        ({"clip": 0.0}, "^clip = 0.0: must be > 0"),
        ({"normalize": "max"}, "^normalize = 'max': must be one of batch, mean, sum"),
        ({"refresh_interval": 0}, "^refresh_interval = 0: must be >= 1"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        adapt(**options)
