"""What a finished run leaves."""

import json

import pytest

from dataflex_jax.json_lines import read_jsonl
from dataflex_jax.reporting.summary import write_results
from tests.helpers.synthetic_run import write_run


@pytest.fixture
def summary_of(monkeypatch):
    """A function that finishes a run and returns its summary; the pictures are tested elsewhere."""
    monkeypatch.setattr("dataflex_jax.reporting.summary.plot_run", lambda folder: [])
    monkeypatch.setattr("dataflex_jax.reporting.summary.write_report", lambda folders, output: output)

    def finished(folder, tokens_per_second=None, mfu=None):
        write_results(folder, steps=20, tokens_seen=100, tokens_per_second=tokens_per_second, mfu=mfu)
        return json.loads((folder / "summary.json").read_text())

    return finished


def test_the_summary_has_the_last_held_out_figures(tmp_path, summary_of, capsys):
    folder = write_run(tmp_path / "run")
    last = read_jsonl(folder / "eval.jsonl")[-1]
    summary = summary_of(folder)
    assert summary["held_out"] == {"overall": last["overall"], "domains": last["domains"]}
    assert list(summary) == [
        "steps",
        "tokens_seen",
        "loss",
        "held_out",
        "domain_epochs",
        "tokens_per_second",
        "mfu",
        "peak_memory",
    ]
    assert capsys.readouterr().out.startswith(f"Held-out loss {last['overall']['nll']:.4f} nats/token after 20 steps.")


def test_other_evaluators_last_figures_are_beside_them(tmp_path, summary_of):
    folder = write_run(tmp_path / "run")
    expected = summary_of(folder)["held_out"]
    lines = [
        {"step": step, "split": "quiz", "domains": {"algebra": {"accuracy": step / 40}}, "overall": None}
        for step in (10, 20)
    ]
    with open(folder / "eval.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    summary = summary_of(folder)
    assert summary["held_out"] == expected
    assert summary["evaluators"] == {"quiz": {"overall": None, "domains": {"algebra": {"accuracy": 0.5}}}}


def test_a_run_that_was_never_evaluated(tmp_path, summary_of):
    folder = write_run(tmp_path / "run")
    (folder / "eval.jsonl").unlink()
    summary = summary_of(folder)
    assert summary["held_out"] == {"overall": None, "domains": {}}
    assert "evaluators" not in summary


def test_a_finished_run_that_is_started_again_keeps_what_it_measured(tmp_path, summary_of):
    folder = write_run(tmp_path / "run")
    first = summary_of(folder, 5e4, 0.25)
    first["peak_memory"] = {"devices": 7}
    (folder / "summary.json").write_text(json.dumps(first))
    assert summary_of(folder) == first
    assert summary_of(folder, 6e4, 0.5)["tokens_per_second"] == 6e4


@pytest.mark.parametrize("name", ["eval.jsonl", "metrics.jsonl"])
def test_a_finished_run_whose_lines_are_gone_keeps_its_figures(tmp_path, summary_of, name):
    folder = write_run(tmp_path / "run")
    first = summary_of(folder, 5e4, 0.25)
    (folder / name).write_text("")
    assert summary_of(folder) == first
    (folder / "summary.json").unlink()
    assert summary_of(folder)["steps"] == 20
