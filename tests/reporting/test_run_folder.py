"""A run folder's summary, and what is read back of it."""

import json
import math
import os
import tracemalloc

import numpy as np
import pytest

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.reporting import run_folder
from dataflex_jax.reporting.run_folder import RunRecords, write_summary


def test_summary(tmp_path):
    path = write_summary(tmp_path / "run", {"loss": np.float32(0.1), "eval": {"mfu": math.nan}})
    assert path == tmp_path / "run" / "summary.json"
    assert json.loads(path.read_text()) == {"loss": float(np.float32(0.1)), "eval": {"mfu": None}}
    with pytest.raises(TrainingError, match=r"summary\.json: eval\.nll is inf"):
        write_summary(tmp_path / "run", {"eval": {"nll": math.inf}})
    write_summary(tmp_path / "run", {"loss": 0})
    assert json.loads(path.read_text()) == {"loss": 0}
    assert os.listdir(path.parent) == ["summary.json"]


def test_run_records_refuse_a_malformed_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert RunRecords.load(tmp_path).metrics == []
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"summary\.json: a JSON list; one object is expected"):
        RunRecords.load(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: not valid JSON"):
        RunRecords.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("metrics.jsonl", {"step": "3", "loss": 1.0}, "step = '3'; an integer is expected"),
        ("metrics.jsonl", {"loss": 1.0}, "step = None; an integer is expected"),
        ("metrics.jsonl", {"step": 3, "loss": "low"}, "loss = 'low'; a number is expected"),
        ("metrics.jsonl", {"step": 3, "domain_loss": [1.0]}, r"domain_loss = \[1.0\]; an object of numbers by name"),
        ("metrics.jsonl", {"step": 3, "domain_epochs": {"a": "b"}}, "domain_epochs = .*; an object of numbers by name"),
        (
            "metrics.jsonl",
            {"step": 3, "domain_router_load": {"a": 0.5}},
            "domain_router_load = .*; an object of lists of",
        ),
        ("policy.jsonl", {"step": 3, "policy": 5}, "policy = 5; a text is expected"),
        ("policy.jsonl", {"step": 3, "sampling_weights": [0.5]}, "sampling_weights = .*; an object of numbers by name"),
        ("policy.jsonl", {"step": 3, "observed": {"domain_loss": 4}}, "observed = .*; an object of objects of numbers"),
        ("policy.jsonl", {"step": 3, "score_mean": {}}, "score_mean = {}; a number is expected"),
        ("policy.jsonl", {"step": 3, "coverage": "all"}, "coverage = 'all'; a number is expected"),
        ("policy.jsonl", {"step": 3, "domain_share": [1.0]}, "domain_share = .*; an object of numbers by name"),
        ("eval.jsonl", {"step": 3, "split": ["valid"]}, "split = .*; a text is expected"),
        ("eval.jsonl", {"step": 3, "split": "valid", "domains": {"a": 1}}, "domains = .*; an object of objects"),
        ("eval.jsonl", {"step": 3, "split": "valid", "overall": 2.5}, "overall = 2.5; an object of numbers by name"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_file_and_line(tmp_path, name, line, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text('{"step": 1}\n' + json.dumps(line) + "\n")
    with pytest.raises(InputError, match=rf"^{tmp_path}/{name}:2: {message}"):
        RunRecords.load(tmp_path)


@pytest.mark.parametrize("time", [None, 5, "yesterday", "2026-01-31T12:00:00"])
def test_a_time_that_is_none_is_named(tmp_path, time):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "times.jsonl").write_text(json.dumps({"step": 1, "time": time}) + "\n")
    with pytest.raises(
        InputError, match=r"times\.jsonl:1: time = .*; a time as 2026-01-31T12:00:00\+00:00 is expected"
    ):
        RunRecords.load(tmp_path)


def numbered(steps, **fields) -> str:
    return "".join(json.dumps({"step": step, **fields}) + "\n" for step in steps)


def test_of_a_long_run_evenly_spaced_lines_are_kept_of_each_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MOST_LINES", 100)
    (tmp_path / "metrics.jsonl").write_text(numbered(range(1, 200)) + '{"step": 200, "lo')
    mixer = [json.dumps({"step": step, "policy": "odm"}) + "\n" for step in range(1, 50_001)]
    selector = json.dumps({"policy": "less", "step": 25_000}) + "\n"
    (tmp_path / "policy.jsonl").write_text("".join([*mixer[:25_000], selector, *mixer[25_000:]]))
    run = RunRecords.load(tmp_path)
    assert [record["step"] for record in run.metrics] == list(range(1, 200))
    assert [record["step"] for record in run.policy if record["policy"] == "less"] == [25_000]
    steps = np.array([record["step"] for record in run.policy if record["policy"] == "odm"])
    assert 100 <= len(steps) <= 202
    assert (steps[0], steps[-1]) == (1, 50_000)
    assert len(set(np.diff(steps[:-1]).tolist())) == 1
    assert (np.diff(steps) > 0).all()


def test_memory_does_not_grow_with_the_number_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MOST_LINES", 100)
    peaks = []
    for steps in (2_000, 40_000):
        (tmp_path / "metrics.jsonl").write_text(numbered(range(steps), text="x" * 100))
        tracemalloc.start()
        RunRecords.load(tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
