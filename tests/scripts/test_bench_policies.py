"""The benchmark of what policies add to a step at a tiny size: what it writes, not how fast they are."""

import json

import numpy as np
import pytest

from tests.helpers import tiny
from tests.scripts.test_bench import MACHINE, MODEL, data, run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.mark.slow
def test_policies_are_paired_with_static_and_refreshed_apart(root, tmp_path):
    output = tmp_path / "policies.json"
    policies = ("adapt", "doremi, cached losses", "ado", "greats")
    chosen = ",".join(f'"{name}"' for name in policies)
    run("policies.py", *MODEL, *data(root), f"--policies={chosen}", "--rounds=1", "--block=4", f"--output={output}")
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert list(result["policies"]) == list(policies)
    assert len(result["static_step_seconds"]["values"]) == len(policies)
    for name, policy in result["policies"].items():
        assert len(policy["time_over_static"]["values"]) == 1
        assert min(policy["step_seconds"]["values"]) > 0
        assert (policy["refresh_seconds"] is None) == (name in ("doremi, cached losses", "greats"))
    # The first policy of a round is between the first block of static and the first of those that are kept.
    ours = result["policies"]["adapt"]
    after = result["static_step_seconds"]["values"][0]
    before = 2 * ours["step_seconds"]["values"][0] / ours["time_over_static"]["values"][0] - after
    assert before > 0
    assert np.isfinite(before)
    page = (tmp_path / "README.md").read_text()
    assert "| [policies](policies.json): policy | time of a step / static | aim |" in page
    assert "| doremi, cached losses | **" in page


def test_an_unknown_policy_is_refused():
    message = run("policies.py", "--policies=lost", code=2)
    assert message.startswith("error: --policies: 'lost' is not one of loss; adapt;")
