import json

import numpy as np
import pytest
from matplotlib import image

from dataflex_jax.errors import InputError
from dataflex_jax.files import file_name
from dataflex_jax.reporting import plot_style, plots
from dataflex_jax.reporting.run_folder import RunRecords
from tests.helpers.synthetic_run import write_run


def append(path, **record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def selection(step, coverage, overlap, **shares):
    return {"step": step, "policy": "less", "coverage": coverage, "overlap": overlap, "domain_share": shares}


def test_a_run_with_a_mixer_is_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    written = plots.plot_run(folder)
    expected = {"loss", "domain_losses", "mixture", "domain_epochs", "optimizer", "throughput"}
    assert {path.stem for path in written} == expected
    assert {path.name for path in (folder / "plots").iterdir()} == {path.name for path in written}
    for path in written:
        pixels = image.imread(path)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert pixels.std() > 0.01


def test_router_loads_are_means_of_the_last_lines_in_which_a_domain_is(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run"))
    styles = plot_style.line_styles(["books", "code", "web"])
    assert plots.router_loads_figure(run, styles) is None
    loads = [[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]
    for line, books in zip(run.metrics[-3:], loads, strict=True):
        line["domain_router_load"] = {"books": books, "code": None, "web": [0.25, 0.75]}
    run.metrics[-1]["domain_router_load"]["web"] = None
    (ax,) = plots.router_loads_figure(run, styles).axes
    assert [line.get_xydata().tolist() for line in ax.get_lines()] == [[[0, 0.3], [1, 0.7]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["books"]


def test_only_what_is_there_is_drawn(tmp_path):
    folder = write_run(tmp_path / "run", mixer=False)
    (folder / "eval.jsonl").unlink()
    (folder / "summary.json").unlink()
    stems = {path.stem for path in plots.plot_run(folder)}
    assert "mixture" not in stems
    assert {"loss", "domain_losses"} <= stems
    (folder / "metrics.jsonl").unlink()
    assert plots.plot_run(folder) == []


def test_not_a_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        plots.plot_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a run folder; config\.json or metrics\.jsonl is expected"):
        plots.plot_run(tmp_path)


def test_one_step_is_enough(tmp_path):
    folder = write_run(tmp_path / "run", steps=1)
    assert {"loss", "mixture"} <= {path.stem for path in plots.plot_run(folder)}


def test_domain_losses_come_from_every_step_and_skip_the_missing(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", steps=20))
    del run.metrics[5:]
    styles = plot_style.line_styles(plots.domain_names(run))
    assert list(styles) == ["books", "code", "web"]
    (ax,) = plots.domain_losses_figure(run, styles).axes
    lines = [line for line in ax.get_lines() if line.get_linestyle() != "None"]
    assert [len(line.get_xdata()) for line in lines] == [20, 20, 10]
    assert list(lines[2].get_xdata()) == list(range(2, 21, 2))
    markers = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    assert [list(line.get_xdata()) for line in markers] == [[5, 10, 15, 20]] * 3


def test_evaluators_do_not_change_the_pictures_of_the_held_out_loss(tmp_path):
    alone = RunRecords.load(write_run(tmp_path / "alone"))
    run = RunRecords.load(write_run(tmp_path / "run", evaluator="mmlu"))
    run.evals.sort(key=lambda record: record["split"])
    assert run.evals[0]["split"] == "mmlu"
    assert plots.domain_names(run) == plots.domain_names(alone) == ["books", "code", "web"]
    drawn, expected = (plots.loss_figure({"": [r]}).axes[0].get_lines() for r in (run, alone))
    for line, expected_line in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), expected_line.get_xydata())


def test_an_evaluators_picture_is_named_after_it(tmp_path):
    written = plots.plot_run(write_run(tmp_path / "run", evaluator="user/my exam"))
    (picture,) = (path for path in written if path.name.startswith("eval_"))
    assert picture == tmp_path / "run" / "plots" / f"eval_{file_name('user/my exam')}.png"
    assert image.imread(picture).std() > 0.01


def test_mixture_legend_tells_first_and_last_share(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run"))
    first, last = run.policy[0]["sampling_weights"], run.policy[-1]["sampling_weights"]
    figure = plots.mixture_figure(run, plot_style.line_styles(["books", "code", "web"]))
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == [f"{n}  {100 * first[n]:.1f} → {100 * last[n]:.1f} %" for n in ("web", "code", "books")]


def test_drawn_with_has_a_panel_only_where_it_differs(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run"))
    styles = plot_style.line_styles(plots.domain_names(run))
    assert len(plots.mixture_figure(run, styles).axes) == 2
    for record in run.policy:
        record["observed"]["drawn_with"] = record["sampling_weights"]
    assert len(plots.mixture_figure(run, styles).axes) == 1


def test_a_domain_added_on_resume_is_in_the_mixture(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run"))
    run.policy[-1]["sampling_weights"]["new"] = 0.0
    figure = plots.mixture_figure(run, plot_style.line_styles(plots.domain_names(run)))
    assert len(figure.axes[0].collections) == 4


def test_selectors_and_weighters_are_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    for step in (5, 10):
        scores = {"score_min": -0.1, "score_mean": 0.2, "score_max": 0.6}
        append(folder / "policy.jsonl", **selection(step, step / 20, None, books=0.5, code=0.5), **scores)
    append(folder / "metrics.jsonl", step=21, example_weight_min=0.1, example_weight_mean=1.0, example_weight_max=2.0)
    stems = {path.stem for path in plots.plot_run(folder)}
    assert {"selection", "selector_scores", "example_weights", "mixture"} <= stems


def test_a_selection_is_drawn_by_domain_with_coverage_and_overlap(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", mixer=False))
    run.policy.append(selection(4, 0.1, None, books=1.0, code=0.0))
    run.policy.append(selection(12, 0.15, 0.5, books=0.25, web=0.75))
    composition, reach = plots.selection_figure(run, plot_style.line_styles(["books", "code", "web"])).axes
    texts = [text.get_text() for text in composition.get_legend().get_texts()]
    assert texts == ["web  0.0 → 75.0 %", "code  0.0 → 0.0 %", "books  100.0 → 25.0 %"]
    # What was chosen last is trained on to the end of the run, at step 20.
    assert composition.get_xlim() == reach.get_xlim() == (4, 20)
    books, _, web = (area.get_paths()[0] for area in composition.collections)
    for step, share in ((8, 1.0), (11.9, 1.0), (12.1, 0.25), (19, 0.25)):
        assert books.contains_point((step, share - 0.01))
        assert not books.contains_point((step, share + 0.01))
        assert web.contains_point((step, share + 0.01)) == (share < 1)
    coverage, overlap = (line.get_xydata().tolist() for line in reach.get_lines())
    assert (coverage, overlap) == ([[4, 0.1], [12, 0.15]], [[12, 0.5]])
    texts = [text.get_text() for text in reach.get_legend().get_texts()]
    assert texts == ["15.0 % of the pool ever chosen", "50.0 % chosen again"]


def test_of_one_domain_and_of_an_earlier_versions_selections_the_coverage_alone_is_drawn(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", mixer=False))
    styles = plot_style.line_styles(["books", "code", "web"])
    assert plots.selection_figure(run, styles) is None
    run.policy.append({"step": 4, "policy": "less", "coverage": 0.1})
    (ax,) = plots.selection_figure(run, styles).axes
    assert [line.get_xydata().tolist() for line in ax.get_lines()] == [[[4, 0.1]]]
    run.policy.append(selection(12, 0.2, 0.5, books=1.0))
    assert len(plots.selection_figure(run, styles).axes) == 1


def test_the_effective_sample_size_is_below_the_example_weights(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", steps=6))
    for record in run.metrics:
        record |= {"example_weight_min": 0.5, "example_weight_mean": 1.0, "example_weight_max": record["step"]}
    assert len(plots.example_weights_figure(run).axes) == 1
    for record in run.metrics:
        record["effective_sample_size"] = 8 / record["step"]
    weights, sizes = plots.example_weights_figure(run).axes
    (line,) = sizes.get_lines()
    np.testing.assert_allclose(line.get_ydata(), 8 / np.arange(1, 7))
    assert sizes.get_ylabel() == "effective sample size [rows]"
    assert weights.get_lines()[0].get_ydata().tolist() == [1.0] * 6


def test_doremis_weights_and_excess_losses_are_drawn(tmp_path):
    names = ["books", "code", "web"]
    run = RunRecords.load(write_run(tmp_path / "run", steps=10))
    styles = plot_style.line_styles(names)
    assert plots.loss_weights_figure(run, styles) is None
    assert plots.excess_figure(run, styles) is None
    for record in run.policy:
        share = record["step"] / 20
        record["state"] = {"alpha": dict(zip(names, (share, 0.2, 0.8 - share), strict=True))}
        record["observed"]["excess"] = {"books": 1.0, "code": None, "web": 0.1 * record["step"]}
    figure = plots.loss_weights_figure(run, styles)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["web  75.0 → 30.0 %", "code  20.0 → 20.0 %", "books  5.0 → 50.0 %"]
    (ax,) = plots.excess_figure(run, styles).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["books", "web"]
    assert [list(line.get_xdata()) for line in ax.get_lines()] == [list(range(1, 11))] * 2
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), 1.0)


def test_any_state_of_a_mixer_can_be_drawn(tmp_path):
    """As that of ado, whose law is a mapping for each domain, and of a user's own."""
    folder = write_run(tmp_path / "run", steps=4)
    lines = (folder / "policy.jsonl").read_text().splitlines()
    states = (
        {"law": {"books": {"alpha": 1.0, "epsilon": 2.0}, "code": None}, "alpha": {"books": {"now": 0.5}}},
        {"alpha": {"rate": 0.5}},
        {"alpha": [0.5, 0.5], "inner": {"alpha": {"books": 1.0}}},
        [1.0, 2.0],
    )
    records = [json.loads(line) | {"state": state} for line, state in zip(lines, states, strict=True)]
    (folder / "policy.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stems = {path.stem for path in plots.plot_run(folder)}
    assert "mixture" in stems
    assert "loss_weights" not in stems


def test_excess_losses_without_a_mixer_come_from_the_metrics(tmp_path):
    """As rho1 leaves them."""
    run = RunRecords.load(write_run(tmp_path / "run", steps=4, mixer=False))
    for record in run.metrics:
        record["domain_excess"] = {"books": 0.5, "code": 0.25, "web": None}
    (ax,) = plots.excess_figure(run, plot_style.line_styles(["books", "code", "web"])).axes
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[0.5] * 4, [0.25] * 4]


def test_names_are_shown_as_they_are(tmp_path):
    names = ("_hidden", "c$4$_x^2", "a & <b>")
    run = RunRecords.load(write_run(tmp_path / "run", names=names))
    figure = plots.domain_losses_figure(run, plot_style.line_styles(names))
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [*names, "held out"]
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_twenty_domains_look_different():
    styles = plot_style.line_styles([str(i) for i in range(20)]).values()
    assert len({(style.color, style.dashes) for style in styles}) == 20
    assert len({style.fill for style in styles}) == 20


def test_drawing_leaves_matplotlib_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.plot_run(write_run(tmp_path / "run"))
    assert dict(matplotlib.rcParams) == before


def test_smoothing_keeps_the_start_and_a_constant():
    values = np.concatenate([[100.0], np.full(199, 2.0)])
    smoothed = plot_style.smooth(values)
    assert smoothed[0] == 100.0
    np.testing.assert_allclose(smoothed[10:], 2.0, rtol=1e-12)
    np.testing.assert_allclose(smoothed[4], values[:9].mean(), rtol=1e-12)


def test_steep_losses_get_a_logarithmic_axis(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run"))
    assert plots.loss_figure({"run": [run]}).axes[0].get_yscale() == "log"
    for record in run.metrics:
        record["loss"] = 3.0 + record["step"] / 1000
    run.evals.clear()
    assert plots.loss_figure({"run": [run]}).axes[0].get_yscale() == "linear"
