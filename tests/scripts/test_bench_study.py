"""The study at a size that says nothing: what it writes, that it goes on, and how rows are compared."""

import importlib
import json

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from tests.helpers import tiny
from tests.scripts.test_bench import MACHINE, SCRIPTS, run

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as shared/data is."""
    folder = tmp_path_factory.mktemp("data")
    root = tiny.write_domains(folder / "slimpajama_mini", 4000)
    for path in sorted(root.glob("*.jsonl")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[6:]))
        path.with_suffix(".valid.jsonl").write_text("".join(lines[:6]))
    (folder / "instruct").mkdir()
    questions = [{"instruction": f"{n}?", "input": "", "output": "abc" * (n % 4 + 1)} for n in range(80)]
    (folder / "instruct" / "alpaca_demo.json").write_text(json.dumps(questions))
    turns = [
        {
            "tree_id": str(n // 2),
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": f"{n}{i}"} for i in range(4)],
        }
        for n in range(80)
    ]
    (folder / "instruct" / "oasst1_demo.json").write_text(json.dumps(turns))
    return folder


@pytest.fixture
def module(monkeypatch):
    """A module of the study."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.mark.slow
def test_it_writes_rows_and_goes_on(data, tmp_path):
    given = (f"--data={data}", f"--runs={tmp_path / 'runs'}", f"--output={tmp_path}", "--small", "--seeds=2")
    rows = "uniform,doremi,swarm,loss,weigh_loss"
    run("study.py", *given, f"--rows={rows}")
    for part, names in {"pretraining": "static uniform doremi swarm", "instruction": "full loss weigh_loss"}.items():
        result = json.loads((tmp_path / f"study_{part}.json").read_text())
        assert result.keys() >= MACHINE
        assert list(result["rows"]) == names.split()
        for name, row in result["rows"].items():
            values = np.array(row["values"])
            assert values.shape == (2, 3 if part == "pretraining" else 2)
            np.testing.assert_allclose(row["worst"]["values"], values.max(axis=1))
            assert ("against" in row["average"]) == (name != result["baseline"])
        assert (tmp_path / f"study_{part}.png").exists()
    before = json.loads((tmp_path / "study_pretraining.json").read_text())["rows"]
    trained = {name: row["trained"] for name, row in before.items()}
    assert trained == {"static": 2, "uniform": 2, "doremi": 5, "swarm": 11}
    assert "as one program" not in run("study.py", *given, f"--rows={rows}")
    assert json.loads((tmp_path / "study_pretraining.json").read_text())["rows"] == before
    assert "| [study_instruction](study_instruction.json) |" in (tmp_path / "README.md").read_text()


def test_data_that_are_absent_are_left_out_with_a_reason(tmp_path):
    printed = run("study.py", f"--data={tmp_path}", f"--runs={tmp_path / 'runs'}", f"--output={tmp_path}", "--small")
    assert f"pretraining is left out: no folder slimpajama_mini in {tmp_path}; --data names" in printed
    assert not (tmp_path / "study_pretraining.json").exists()


def test_sides_of_the_data_share_nothing(data, tmp_path, module):
    made = module("study_data")
    made.pretraining(data / "slimpajama_mini", tmp_path / "text")
    files = ("train/code.valid.jsonl", "other/code.jsonl")
    valid, other = ((tmp_path / "text" / file).read_text().splitlines() for file in files)
    assert len(valid) == len(other) == 3
    assert sorted(valid + other) == sorted((data / "slimpajama_mini/code.valid.jsonl").read_text().splitlines())

    made.instruction(data / "instruct", tmp_path / "questions")
    sides = [
        [json.loads(line) for line in (tmp_path / "questions" / file).read_text().splitlines()]
        for file in ("train/oasst1.jsonl", "train/oasst1.valid.jsonl", "other/oasst1.jsonl")
    ]
    assert sum(map(len, sides)) == 160
    # The questions of a tree are on one side.
    trees = [{int(record["instruction"][:-1]) // 2 for record in side} for side in sides]
    assert all(trees)
    assert sum(map(len, trees)) == len(set.union(*trees)) == 40
    assert {record["output"][-1] for record in sides[0]} == {"1", "3"}


def test_rows_are_compared_seed_by_seed(module):
    losses, rows = module("study_runs").Losses, module("study_rows").PRETRAINING
    noise = np.array([[0.1, -0.3], [2.0, 1.0], [-1.0, 0.5], [0.7, 0.2]])
    base = losses(("a", "b"), 3.0 + noise, 4, 1.0)
    better = losses(("a", "b"), 3.0 + noise - [[0.10], [0.11], [0.12], [0.09]], 4, 1.0)
    chance = losses(("a", "b"), 3.0 + noise[::-1], 4, None)
    table = module("study_table")
    lines = table.table({"static": base, "ado": better, "odm": chance}, rows, "static", range(4))
    against = lines["ado"]["average"]["against"]
    assert against["mean"] == pytest.approx(-0.105)
    assert (against["sign"], against["clear"]) == (-1, True)
    assert (against["wins"], against["losses"]) == (4, 0)
    assert against["p"] == pytest.approx(ttest_1samp([-0.10, -0.11, -0.12, -0.09], 0).pvalue)
    other = lines["odm"]["average"]["against"]
    assert (other["sign"], other["clear"]) == (0, False)
    assert lines["static"]["worst"]["values"] == pytest.approx((3.0 + noise).max(axis=1))
    assert "against" not in lines["static"]["average"]


def test_a_difference_that_many_comparisons_may_give_is_not_clear(module):
    table = module("study_table")
    comparisons = [{"p": p} for p in (0.04, 0.004, 0.02, 0.3)]
    table._mark_clear(comparisons)
    # Holm: 0.004 <= 0.05/4; then 0.02 > 0.05/3, and nothing after it.
    assert [each["clear"] for each in comparisons] == [False, True, False, False]
