"""Every mixer goes on exactly where it was, whatever state it has."""

import numpy as np
import pytest

from dataflex_jax.policies.common import scaling_law
from tests.helpers import policy_runs, tiny

# Beyond the defaults: so that there is something to decide within 10 steps.
FIELDS = {
    "ado": {"mixer__ignore": 0, "mixer__smoothing": 1, "mixer__history": 16},
    "dynamic_moe": {"model__architecture": "olmoe", "model__num_experts": 4, "model__num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """A run for the policies that compare with one."""
    return policy_runs.train(tmp_path_factory.mktemp("reference"), root, train_step=3, seed=1)


@pytest.mark.parametrize("name", policy_runs.some_of("mixer", "odm", "doge"))
def test_every_mixer_goes_on_as_if_never_interrupted(root, reference, tmp_path, monkeypatch, name):
    monkeypatch.setattr(scaling_law, "_ITERATIONS", 8)  # a rough fit goes on as exactly as a good one
    config = policy_runs.resumable(root, reference, "mixer", name, **FIELDS.get(name, {}))
    metrics, lines = policy_runs.assert_goes_on(config, tmp_path)
    policy = [line for line in lines if "observed" in line]
    assert [line["step"] for line in policy] == list(range(1, 11))
    assert (len(lines) > len(policy)) == (name == "doge")
    if name == "ado":
        assert all(policy[-1]["state"]["fitted"].values())
    if name == "dynamic_moe":
        assert all(1.9 < line["router_balancing_loss"] < 4 for line in metrics)
        weights, distances = (
            np.array([list(line["state"][field].values()) for line in policy]) for field in ("weights", "distance")
        )
        assert distances[-1].min() > 0
        moved = weights[:-1] * np.exp(10 * distances[1:])
        expected = 0.95 * moved / moved.sum(axis=1, keepdims=True) + 0.05 / weights.shape[1]
        np.testing.assert_allclose(weights[1:], expected, atol=1e-6)
    if name == "doge":
        assert policy[-1]["state"]["count"] == 10
        compared = [line for line in lines if "domain_gradients" in line]
        assert [line["step"] for line in compared] == list(range(10))
        # What is needed to recompute the weights is there; see `doge`.
        before = None
        for line, after in zip(compared, policy, strict=True):
            gram, lr = np.array(line["domain_gradients"]["gram"]), line["domain_gradients"]["learning_rate"]
            norms = np.sqrt(np.diagonal(gram))
            score = np.clip(lr * (gram.sum(axis=1) - norms**2) / norms.mean(), 0, 5 * lr)
            weights = np.array(list(after["state"]["weights"].values()))
            if before is not None:
                moved = before * np.exp(score / 0.01)
                np.testing.assert_allclose(weights, moved / moved.sum(), rtol=1e-4)
            before = weights


@pytest.mark.slow
def test_rewards_by_held_out_losses_go_on_as_if_never_interrupted(root, reference, tmp_path):
    fields = {"mixer__reward": "validation", "mixer__reward_scale": 9.0, "update_step": 3, "eval_rows": 2}
    _, lines = policy_runs.assert_goes_on(policy_runs.resumable(root, reference, "mixer", "odm", **fields), tmp_path)
    states = [line["state"] for line in lines]
    counts = [state["count"] for state in states]
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert set(states[0]["fall"].values()) == {0.0}
    assert all(state["held_out"] != states[0]["held_out"] for state in states[3:])
    assert states[-1]["weights"] != states[0]["weights"]
