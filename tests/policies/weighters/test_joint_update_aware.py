"""The joint_update_aware weighter against a float64 transcription and the peer's recorded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies.weighters.joint_update_aware import OBJECTIVES, joint_update_aware
from tests.helpers.fake_signals import FakeRows, FakeSignals
from tests.helpers.observations import of_rows, recorded


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def transcription(z, u, objective, beta, tau, iterations, damping):
    """The fixed-point iteration in float64; weights that sum to 1."""
    w = np.full(len(z), 1 / len(z))
    if objective == "uniform":
        return w
    for _ in range(iterations):
        score = np.zeros(len(z))
        if objective != "diverse_only":
            score = score + z @ u
        if objective != "align_only":
            score = score - beta * (z @ z.T) @ w
        w = (1 - damping) * w + damping * softmax(score / tau)
    return w


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize(("beta", "tau", "iterations", "damping"), [(0.1, 0.05, 5, 1.0), (0.8, 0.4, 9, 0.5)])
def test_equals_the_transcription(objective, how, beta, tau, iterations, damping):
    rng = np.random.default_rng(0)
    targets = FakeRows(hidden=rng.normal(size=(4, 3, 6)), mask=np.ones((4, 3)))
    hidden, mask = rng.normal(size=(9, 3, 6)), np.ones((9, 3))
    mask[::2, 2] = 0
    weighter = joint_update_aware(
        objective=objective, pooling=how, beta=beta, tau=tau, iterations=iterations, damping=damping
    )
    state = weighter.init(6)
    if weighter.refresh is not None:
        state = weighter.refresh(state, FakeSignals(targets=targets))
    embeddings = None if weighter.embed is None else weighter.embed(jnp.asarray(hidden), jnp.asarray(mask))
    weights = jax.jit(weighter.weigh)(state, of_rows(np.ones(9), embeddings=embeddings))

    def pooled(hidden, mask):
        if how == "mean":
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return hidden[np.arange(len(hidden)), mask.sum(1).astype(int) - 1]

    u = unit(pooled(targets.hidden, targets.mask).mean(0))
    expected = transcription(unit(pooled(hidden, mask)), u, objective, beta, tau, iterations, damping)
    np.testing.assert_allclose(weights, 9 * expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)


def test_equal_rows_share_what_one_of_them_would_get():
    """Redundancy: of two directions that are equally aligned, the one that several rows have weighs less a row."""
    a, b, u = np.eye(3)[0], np.eye(3)[1], unit(np.array([1.0, 1, 0]))
    z = np.stack([a, a, a, b])
    weighter = joint_update_aware(beta=0.5, tau=0.5, iterations=50, damping=0.5)
    weights = weighter.weigh(weighter.init(3)._replace(target=jnp.asarray(u)), of_rows(np.ones(4), embeddings=z))
    assert weights[3] > 1 > weights[0]
    np.testing.assert_allclose(weights[:3], weights[0], rtol=1e-6)


def test_no_target_set_is_refused_where_the_objective_needs_one():
    weighter = joint_update_aware()
    with pytest.raises(InputError, match=r"^weighter 'joint_update_aware' needs a target set"):
        weighter.refresh(weighter.init(6), FakeSignals())
    assert joint_update_aware(objective="diverse_only").refresh is None


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("how", "name"), [("last", "last_token"), ("mean", "mean_pool")])
def test_the_peers_recorded_weights(objective, how, name):
    """Its mean is over the tokens of the response, so that they are what the mask says here."""
    numbers = recorded("weighters_core.npz")
    table = numbers["embed_table"]

    def mask(rows):
        return numbers[f"{rows}_attention_mask"] if how == "last" else 1 * (numbers[f"{rows}_labels"] >= 0)

    weighter = joint_update_aware(objective=objective, pooling=how)
    state = weighter.init(table.shape[1])
    if weighter.refresh is not None:
        targets = FakeRows(hidden=table[numbers["eval_input_ids"]], mask=mask("eval"))
        state = weighter.refresh(state, FakeSignals(targets=targets))
    embeddings = None
    if weighter.embed is not None:
        embeddings = weighter.embed(jnp.asarray(table[numbers["train_input_ids"]]), jnp.asarray(mask("train")))
    losses = numbers["emb_losses"]
    weights = weighter.weigh(state, of_rows(losses, embeddings=embeddings))
    expected = numbers[f"jua/{objective}_{name}/weights"]
    np.testing.assert_allclose(weights / len(losses), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "^beta = -0.1: must be >= 0"),
        ({"tau": 0.0}, "^tau = 0.0: must be > 0"),
        ({"iterations": 0}, r"^iterations = 0: must be in \[1, 10000\]"),
        ({"damping": 0.0}, "^damping = 0.0: must be in"),
        ({"objective": "aligned"}, "^objective = 'aligned': must be one of full"),
        ({"pooling": "first"}, "^pooling = 'first': must be one of last, mean"),
        ({"refresh_interval": 0}, "^refresh_interval = 0: must be >= 1"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        joint_update_aware(**options)
