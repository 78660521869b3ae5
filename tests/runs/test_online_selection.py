"""Selectors inside the step, in whole runs: what is drawn and kept, what is counted, and that a resume is exact."""

import numpy as np
import pytest

from dataflex_jax.training.setup import prepared
from tests.helpers import policy_runs, tiny

WARMUP, STEPS = 2, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """A run for the policies that compare with one."""
    return policy_runs.train(tmp_path_factory.mktemp("reference"), root, train_step=3, seed=1)


def config(root, reference, name, **fields):
    fields = {"warmup_step": WARMUP, "mixer": "odm", "selector__target_rows": 4} | fields
    if name == "rho_loss":
        del fields["selector__target_rows"]
    return policy_runs.resumable(root, reference, "selector", name, **fields)


@pytest.mark.parametrize("name", ["greats", pytest.param("rho_loss", marks=pytest.mark.slow)])
def test_it_goes_on_as_if_never_interrupted_and_counts_what_was_drawn(root, reference, tmp_path, name):
    made = config(root, reference, name)
    metrics, policy = policy_runs.assert_goes_on(made, tmp_path)
    for line in metrics:
        assert ("domain_kept" in line) == (line["step"] > WARMUP)
    assert [sum(line["observed"]["domain_rows"].values()) for line in policy] == [8] * STEPS
    with prepared(made, tmp_path / "whole") as (_, _, position):
        assert position.rows_seen.sum() == 8 * WARMUP + 16 * (STEPS - WARMUP)
        assert position.tokens_seen <= 8 * STEPS * made.data.seq_len
        np.testing.assert_array_equal(position.sampler.cursors, position.rows_seen)


@pytest.mark.slow
def test_with_weighters_and_microbatches_it_goes_on(root, reference, tmp_path):
    made = config(root, reference, "greats", weighter="loss+adapt", data__batch_size=16, data__grad_accumulation=2)
    metrics, _ = policy_runs.assert_goes_on(made, tmp_path)
    assert all(0 < line["effective_sample_size"] <= 16.001 for line in metrics)
