"""Every weighter goes on exactly where it was, whatever state it has, and so do several policies together."""

import pytest

from tests.helpers import policy_runs, tiny

# Beyond the defaults: so that a refresh falls into the part that is done again.
FIELDS = {name: {"weighter__refresh_interval": 3} for name in ("adapt", "joint_update_aware")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """A run for the policies that compare with one."""
    return policy_runs.train(tmp_path_factory.mktemp("reference"), root, train_step=3, seed=1)


# `field`, which wants records, does in tests/data/test_record_numbers.py.
@pytest.mark.parametrize("name", policy_runs.some_of("weighter", "loss", "adapt", without=("field",)))
def test_every_weighter_goes_on_as_if_never_interrupted(root, reference, tmp_path, name):
    config = policy_runs.resumable(root, reference, "weighter", name, **FIELDS.get(name, {}))
    metrics, policy = policy_runs.assert_goes_on(config, tmp_path)
    assert all("effective_sample_size" in line for line in metrics)
    assert [line["step"] for line in policy] == ([1, 4, 7] if name in FIELDS else [])


@pytest.mark.slow
def test_a_mixer_and_two_weighters_go_on_together(root, reference, tmp_path):
    fields = {"mixer": "doremi", "mixer__reference_losses": "cached", "mixer__reference": str(reference)}
    fields |= {"weighter__adapt__refresh_interval": 3}
    config = policy_runs.resumable(root, reference, "weighter", "loss+adapt", **fields)
    _, policy = policy_runs.assert_goes_on(config, tmp_path)
    assert [line["step"] for line in policy if line["policy"] == "adapt"] == [1, 4, 7]
    assert [line["step"] for line in policy if line["policy"] == "doremi"] == list(range(1, 11))
