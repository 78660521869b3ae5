import numpy as np

from dataflex_jax.reporting.evaluation_plots import evaluator_figure, held_out_by_domain_figure
from dataflex_jax.reporting.run_folder import RunRecords
from tests.helpers.synthetic_run import write_run


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]


def test_each_metric_of_an_evaluator_is_a_curve_over_steps(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", evaluator="mmlu"))
    figure = evaluator_figure({"run": [run]}, "mmlu")
    assert titles(figure) == ["accuracy", "length"]
    (accuracy,) = figure.axes[0].get_lines()
    assert accuracy.get_xdata().tolist() == [10, 20]
    np.testing.assert_allclose(accuracy.get_ydata(), [0.4, 0.5])
    assert not figure.legends


def test_one_evaluation_is_no_curve(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", evaluator="mmlu"))
    assert evaluator_figure({"run": [run]}, "other") is None
    del run.evals[-2]["overall"]["length"]
    assert run.evals[-2]["split"] == "mmlu"
    assert titles(evaluator_figure({"run": [run]}, "mmlu")) == ["accuracy"]
    run.evals[-2]["overall"] = None
    assert evaluator_figure({"run": [run]}, "mmlu") is None


def test_runs_are_compared_by_evaluator_and_by_domain(tmp_path):
    runs = {
        name: [RunRecords.load(write_run(tmp_path / name, evaluator=evaluator, offset=offset))]
        for name, evaluator, offset in (("a", "mmlu", 0.0), ("b", "mmlu", 0.1), ("c", None, 0.2))
    }
    figure = evaluator_figure(runs, "mmlu")
    assert [len(line.get_xdata()) for line in figure.axes[0].get_lines()] == [2, 2, 0]
    by_domain = held_out_by_domain_figure(runs, ["books", "law", "web"])
    assert titles(by_domain) == ["books", "web"]
    assert [len(line.get_xdata()) for line in by_domain.axes[0].get_lines()] == [4, 4, 4]
    for drawn in (figure, by_domain):
        assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b", "c"]
