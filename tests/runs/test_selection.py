"""Selectors in whole runs: what is chosen is what is trained on, when and how often, and what is refused."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.selection.windows import Selection
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat
from tests.helpers.trackers import Wandb

BATCH = 8


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    documents = tiny.write_domains(data / "documents", characters=1800, names=("digits", "vowels"))
    return {"questions": tiny_chat.write_questions(data / "questions"), "documents": documents}


def config_of(roots, kind, **options):
    return (tiny_chat.config if kind == "questions" else tiny_chat.documents)(roots[kind], **options)


@pytest.mark.parametrize("kind", ["questions", "documents"])
@pytest.mark.parametrize("selector", ["random", "loss", "delta_loss", "less"])
def test_a_run_trains_on_exactly_what_was_chosen(roots, tmp_path, monkeypatch, kind, selector):
    run = tiny_chat.trained(config_of(roots, kind, selector=selector), tmp_path, monkeypatch)
    chosen, lines = run.selections(), run.decisions()
    assert list(chosen) == [line["step"] for line in lines] == [1, 3]
    pool = len(chosen[1]["all_scores"])
    for step, line in zip(chosen, lines, strict=True):
        arrays = chosen[step]
        ids, scores = arrays["ids"], arrays["scores"]
        assert line.keys() == {
            *("step", "update", "pool", "policy", "selected", "distinct", "not_finite"),
            *("score_min", "score_mean", "score_max", "file", "coverage", "domain_share", "overlap"),
        }
        assert (line["policy"], line["pool"], line["selected"], line["not_finite"]) == (selector, pool, 2 * BATCH, 0)
        assert line["distinct"] == len(set(ids.tolist())) == 2 * BATCH
        assert line["file"] == f"selections/step_{step:08d}.npz"
        figures = [scores.min(), scores.mean(dtype=float), scores.max()]
        np.testing.assert_allclose([line[f"score_{name}"] for name in ("min", "mean", "max")], figures, rtol=1e-6)
        np.testing.assert_array_equal(arrays["all_scores"][ids], scores)
        assert arrays["all_scores"].dtype == np.float32
        assert list(line["domain_share"].values()) == (np.bincount(arrays["domains"], minlength=2) / len(ids)).tolist()
        assert ("records" in arrays) == (kind == "questions")
        told = tiny.records(tmp_path / "selections", f"step_{step:08d}.jsonl")
        assert [line["score"] for line in told if line["end"] == "highest"] == sorted(arrays["all_scores"])[:-11:-1]
        assert all(line["chosen"] == (line["id"] in ids) and len(line["text"]) > 2 for line in told)
        if selector == "less":
            np.testing.assert_array_equal(scores, np.sort(arrays["all_scores"])[::-1][: 2 * BATCH])
    ever = [set(chosen[1]["ids"].tolist()), {*chosen[1]["ids"].tolist(), *chosen[3]["ids"].tolist()}]
    assert [line["coverage"] for line in lines] == pytest.approx([len(ids) / pool for ids in ever])
    again = 2 * len(ever[0]) - len(ever[1])
    assert [line["overlap"] for line in lines] == [None, pytest.approx(again / (2 * BATCH))]
    # Steps 2 and 3 are the first choice, 4 and 5 the second, 6 and 7 the second in another order.
    passes = run.rows[1:].reshape(3, 2 * BATCH)
    for rows, step in zip(passes, (1, 3, 3), strict=True):
        np.testing.assert_array_equal(np.sort(rows), np.sort(chosen[step]["ids"]))
        assert (rows != chosen[step]["ids"]).any()
    assert (passes[1] != passes[2]).any()
    assert set(chosen[1]["ids"]) != set(chosen[3]["ids"])


def test_seconds_are_recorded_and_wandb_has_the_choice_and_the_configuration(roots, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train_and_evaluate(
        config_of(roots, "questions", selector="random", train_step=2, wandb_project="project"), tmp_path
    )
    (line,) = (tmp_path / "policy.jsonl").read_text().splitlines()
    assert '"seconds": ' in line
    (run,) = wandb.runs
    assert run.arguments["config"] == json.loads((tmp_path / "config.json").read_text())["config"]
    assert run.arguments["config"]["selector"]["name"] == "random"
    (logged,) = (values for values in run.logged if "selection/coverage" in values)
    record = json.loads(line)
    assert (logged["step"], logged["selection/coverage"]) == (1, record["coverage"])
    assert logged["selection/domain_share/digits"] == record["domain_share"]["digits"]


def test_the_schedule_may_begin_before_the_first_step(roots, tmp_path, monkeypatch):
    fields = {"selector__warmup_step": 0, "selector__update_step": 3, "selector__update_times": -1}
    run = tiny_chat.trained(config_of(roots, "questions", selector="less", **fields), tmp_path, monkeypatch)
    chosen = run.selections()
    assert list(chosen) == [0, 3, 6]
    for step, arrays in chosen.items():
        rows = run.rows[step : step + 3].reshape(-1)
        assert set(rows.tolist()) <= set(arrays["ids"].tolist())
        assert len(set(rows.tolist())) == len(rows)
        assert len(arrays["ids"]) == 3 * BATCH


def test_full_trains_as_without_a_selector_does(roots, tmp_path, monkeypatch):
    full = tiny_chat.trained(config_of(roots, "questions", selector="full"), tmp_path / "full", monkeypatch)
    none = tiny_chat.trained(config_of(roots, "questions"), tmp_path / "none", monkeypatch)
    np.testing.assert_array_equal(full.rows, none.rows)
    assert not full.selections()


def test_with_a_mixer_selection_is_inside_each_domain(roots, tmp_path, monkeypatch):
    options = {"mixer": "odm", "selector": "less", "mixer__warmup_step": 0, "mixer__update_step": 1}
    config = config_of(roots, "questions", **options, mixer__update_times=-1)
    run = tiny_chat.trained(config, tmp_path, monkeypatch)
    observed = [line for line in tiny.records(tmp_path, "policy.jsonl") if "observed" in line]
    assert len({tuple(line["observed"]["drawn_with"].values()) for line in observed}) > 3
    for step, arrays in run.selections().items():
        assert sorted(arrays["domains"].tolist()) == arrays["domains"].tolist()  # group by group
        border = int((arrays["domains"] == 0).sum())
        assert abs(len(arrays["ids"]) - 2 * BATCH) <= 1
        for part in (arrays["scores"][:border], arrays["scores"][border:]):
            assert (np.diff(part) <= 0).all()
        rows = run.rows[step : step + 2].reshape(-1)
        assert set(rows.tolist()) <= set(arrays["ids"].tolist())
        in_first = np.isin(rows, arrays["ids"][:border])
        names = sorted(tiny_chat.SIZES)
        drawn = [sum(line["observed"]["domain_rows"][name] for line in observed[step : step + 2]) for name in names]
        assert drawn == [in_first.sum(), (~in_first).sum()]
        # A domain that gives more rows than was foreseen begins again; no row comes twice more than another.
        for part in (arrays["ids"][:border], arrays["ids"][border:]):
            counts = [(rows == i).sum() for i in part]
            assert max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_with_a_weighter_training_changes_and_the_first_choice_does_not(roots, tmp_path, monkeypatch):
    options = {"selector": "less", "selector__warmup_step": 0, "train_step": 3}
    weighed = config_of(roots, "questions", weighter="loss", **options)
    run = tiny_chat.trained(weighed, tmp_path / "weighed", monkeypatch)
    expected = tiny_chat.trained(config_of(roots, "questions", **options), tmp_path / "plain", monkeypatch)
    assert list(run.selections()) == [0, 2]
    for name in ("ids", "all_scores"):
        np.testing.assert_array_equal(run.selections()[0][name], expected.selections()[0][name])
    np.testing.assert_array_equal(run.rows[:2], expected.rows[:2])
    assert (run.selections()[2]["all_scores"] != expected.selections()[2]["all_scores"]).any()
    metrics = tiny.records(run.folder, "metrics.jsonl")
    assert metrics[0]["example_weight_max"] == 1 < metrics[1]["example_weight_max"]


def test_more_wanted_than_there_are_is_said_once(roots, tmp_path, monkeypatch, caplog):
    config = config_of(roots, "questions", selector="random", update_step=12, train_step=26, update_times=-1)
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        run = tiny_chat.trained(config, tmp_path, monkeypatch)
    assert list(run.selections()) == [1, 13, 25]
    said = [record.message for record in caplog.records if "examples wanted" in record.message]
    pool = run.decisions()[0]["pool"]
    assert said == [f"random: pool: 96 examples wanted of {pool}; each is taken once before any is taken again."]
    for step in (1, 13):
        counts = np.bincount(run.rows[step : step + 12].reshape(-1), minlength=pool)
        assert set(counts) == {1, 2}
        np.testing.assert_array_equal(counts, np.bincount(run.selections()[step]["ids"], minlength=pool))


@pytest.mark.parametrize("selector", ["less", "loss"])
def test_rows_that_are_not_finite_are_counted_and_never_chosen(roots, tmp_path, monkeypatch, caplog, selector):
    bad, sweep = np.arange(0, 60, 3), SweptRows.sweep

    def poisoned(rows, signal, ids=None, operand=None):
        values = sweep(rows, signal, ids, operand)
        if rows.num_rows > bad[-1]:  # the candidates, not the targets
            values[bad[::2]], values[bad[1::2]] = np.nan, np.inf
        return values

    monkeypatch.setattr(SweptRows, "sweep", poisoned)
    config = config_of(roots, "questions", selector=selector)
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        run = tiny_chat.trained(config, tmp_path, monkeypatch)
    assert [line["not_finite"] for line in run.decisions()] == [len(bad)] * 2
    assert sum("not finite" in record.message for record in caplog.records) == 1
    for arrays in run.selections().values():
        assert np.isnan(arrays["all_scores"][bad]).all()
        assert np.isfinite(np.delete(arrays["all_scores"], bad)).all()
    assert not np.isin(run.rows[1:], bad).any()


def test_a_pool_without_a_finite_row_ends_the_run_in_one_line(roots, tmp_path, monkeypatch):
    monkeypatch.setattr(SweptRows, "sweep", lambda self, *_: np.full(self.num_rows, np.nan, np.float32))
    with pytest.raises(TrainingError, match="pool: no candidate has a finite loss or gradient") as caught:
        train_and_evaluate(config_of(roots, "questions", selector="loss"), tmp_path)
    assert "\n" not in str(caught.value)


EXPERTS = {"model__architecture": "olmoe", "model__num_experts": 4, "model__num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__valid_fraction": 0.0}, "config.targets: group 'capitals' has no rows .raise config.data.valid_frac"),
        ({"selector__gradient_type": "sdg"}, "config.selector.gradient_type = 'sdg': must be one of adam, sgd"),
        ({"selector__projection": "kronecker"}, "config.selector.projection = 'kronecker': forms no gradient that"),
        ({"selector__update_step": 0}, "config.selector.update_step = 0: must be >= 1"),
        (
            {"selector__projection": "kronecker", "selector__gradient_type": "sgd"} | EXPERTS,
            "config.selector: layers/mlp/experts/.* is of routed experts",
        ),
        (
            {"data__proportions": (3.0, 1.0)},
            "config.data.proportions: without a mixer a selector or an order has the pool as a whole",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(roots, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        train_and_evaluate(config_of(roots, "questions", selector="less", **options), tmp_path)
    assert "\n" not in str(caught.value)


def test_another_selector_belongs_to_another_run(roots, tmp_path):
    train_and_evaluate(config_of(roots, "questions", selector="random", train_step=3), tmp_path)
    with pytest.raises(InputError, match=r"config\.selector\.name = 'loss': the checkpoint .* with 'random'"):
        train_and_evaluate(config_of(roots, "questions", selector="loss"), tmp_path)


def test_what_is_selected_once_is_no_more_than_a_run_draws(roots, tmp_path, monkeypatch):
    config = config_of(roots, "documents", selector="random", train_step=3, warmup_step=1, update_step=10**6)
    run = tiny_chat.trained(config, tmp_path, monkeypatch)
    ((step, arrays),) = run.selections().items()
    assert (step, len(arrays["ids"])) == (1, 3 * BATCH)


def test_a_restart_makes_its_own_selections_again_and_leaves_others_alone(tmp_path):
    for name in ("step_00000002", "step_00000004", "step_best", "step_", "mine"):
        (tmp_path / f"{name}.npz").touch()
    for name in ("step_00000002", "step_00000004"):
        (tmp_path / f"{name}.jsonl").touch()
    Selection.forget_after(SimpleNamespace(_folder=tmp_path), 4)
    kept = {"mine.npz", "step_.npz", "step_00000002.jsonl", "step_00000002.npz", "step_best.npz"}
    assert {path.name for path in tmp_path.iterdir()} == kept
