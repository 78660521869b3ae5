"""config.data.weigh_over in whole runs: over microbatches, weights of the whole batch are those without them."""

import numpy as np
import pytest

from tests.helpers import policy_runs, tiny


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A function of microbatches and weigh_over to the lines of metrics.jsonl and policy.jsonl."""
    folder = tmp_path_factory.mktemp("runs")
    root = tiny.write_domains(folder / "domains")
    reference = policy_runs.train(folder / "reference", root, train_step=3)

    def of(microbatches, weigh_over):
        run = policy_runs.train(
            folder / f"{microbatches}-{weigh_over}",
            root,
            "doremi",
            "loss",
            train_step=3,
            data__batch_size=16,
            data__grad_accumulation=microbatches,
            data__weigh_over=weigh_over,
            mixer__reference=str(reference),
            weighter__r=0.3,
        )
        return tiny.records(run, "metrics.jsonl"), tiny.records(run, "policy.jsonl")

    return of


@pytest.mark.slow
def test_weights_of_the_whole_batch_do_not_depend_on_microbatches(lines):
    whole, of_batch, of_microbatches = lines(1, "batch"), lines(2, "batch"), lines(2, "microbatch")
    for ours, expected in zip(of_batch[0], whole[0], strict=True):
        for figure in ("loss", "grad_norm", "example_weight_max", "effective_sample_size"):
            np.testing.assert_allclose(ours[figure], expected[figure], rtol=1e-4)
    for ours, expected in zip(of_batch[1], whole[1], strict=True):
        for name, alpha in expected["state"]["alpha"].items():
            np.testing.assert_allclose(ours["state"]["alpha"][name], alpha, atol=1e-5)
    # All rows have as many tokens, so that only the weights tell the losses of the first step apart.
    assert abs(of_microbatches[0][0]["loss"] / whole[0][0]["loss"] - 1) > 1e-4
    assert of_microbatches[0][0]["example_weight_mean"] == pytest.approx(1)
