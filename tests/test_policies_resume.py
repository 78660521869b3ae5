"""Every mixer and every weighter goes on exactly where it was, whatever state it has."""

import shutil

import pytest

from dataflex_jax.policies import registry
from dataflex_jax.train import train_and_evaluate
from tests import policy_runs, tiny
from tests.command import assert_same_curves, copy_of, saved_steps

# Beyond the defaults: so that it decides something within the run's 10 steps.
FIELDS = {
    "ado": {"mixer__ignore": 0, "mixer__smoothing": 1, "mixer__history": 16},
    "adapt": {"weighter__refresh_interval": 3},
    "joint_update_aware": {"weighter__refresh_interval": 3},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """A run for the policies that compare with one."""
    return policy_runs.train(tmp_path_factory.mktemp("reference"), root, train_step=3, seed=1)


def assert_goes_on(config, tmp_path):
    """A copy of the finished run is left as a kill at step 4 leaves it: all lines, no later checkpoint."""
    train_and_evaluate(config, tmp_path / "whole")
    run = copy_of(tmp_path / "whole", tmp_path / "run")
    for later in saved_steps(run):
        if later > 4:
            shutil.rmtree(run / "checkpoints" / str(later))
    train_and_evaluate(config, run)
    assert saved_steps(run)[-1] == 10
    assert_same_curves(run, tmp_path / "whole")
    return tiny.records(run, "metrics.jsonl"), tiny.records(run, "policy.jsonl")


def config_of(root, reference, kind, name, **fields):
    fields = {"train_step": 10, "warmup_step": 1, "checkpoint_every": 4, "eval_every": 4} | fields
    config = policy_runs.config(root, **{kind: name}, **fields, **FIELDS.get(name, {}))
    if "reference" in config[kind]:
        config[kind].reference = str(reference)
    return config


@pytest.mark.parametrize("name", registry.names("mixer"))
def test_every_mixer_goes_on_as_if_never_interrupted(root, reference, tmp_path, name):
    _, policy = assert_goes_on(config_of(root, reference, "mixer", name), tmp_path)
    assert [line["step"] for line in policy] == list(range(1, 11))
    if name == "ado":
        assert all(policy[-1]["state"]["fitted"].values())


@pytest.mark.parametrize("name", registry.names("weighter"))
def test_every_weighter_goes_on_as_if_never_interrupted(root, reference, tmp_path, name):
    metrics, _ = assert_goes_on(config_of(root, reference, "weighter", name), tmp_path)
    assert all("effective_sample_size" in line for line in metrics)


def test_a_mixer_and_two_weighters_go_on_together(root, reference, tmp_path):
    fields = {"mixer": "doremi", "mixer__reference_losses": "cached", "weighter__adapt__refresh_interval": 3}
    config = config_of(root, reference, "weighter", "loss+adapt", **fields, mixer__reference=str(reference))
    _, policy = assert_goes_on(config, tmp_path)
    assert [line["step"] for line in policy if line["policy"] == "adapt"] == [1, 4, 7]
