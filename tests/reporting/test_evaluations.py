import math

from dataflex_jax.reporting.evaluations import evaluations, shown_metrics, splits, stderr_key
from dataflex_jax.reporting.run_folder import RunRecords
from tests.helpers.synthetic_run import write_run


def test_known_metrics_come_first_and_counts_and_errors_are_not_shown():
    scores = [{"mood": 1.0, "bits_per_byte": 1.0, "samples": 3}, None, {"nll": 2.0, "nll_stderr": 0.1, "tokens": 5}]
    metrics = shown_metrics(scores)
    assert [metric.key for metric in metrics] == ["nll", "bits_per_byte", "mood"]
    assert [metric.label for metric in metrics] == ["nll [nats/token]", "bits/byte", "mood"]
    assert stderr_key(metrics[0]) == "nll_stderr"


def test_losses_are_best_low_and_accuracies_high():
    best = {metric.key: metric.best for metric in shown_metrics([{"nll": 0.0, "accuracy": 0.0, "mood": 0.0}])}
    assert best == {"nll": min, "accuracy": max, "mood": None}
    (mood,) = shown_metrics([{"mood": math.pi}])
    assert mood.number.format(math.pi) == "3.142"


def test_splits_are_told_apart(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", evaluator="mmlu"))
    assert splits([run]) == ["valid", "mmlu"]
    assert [record["step"] for record in evaluations(run)] == [5, 10, 15, 20]
    assert [record["step"] for record in evaluations(run, "mmlu")] == [10, 20]
    assert evaluations(run, "other") == []
