"""scripts/mapped_seeds.py: what it leaves of each seed is what the report compares."""

import importlib
import json

import numpy as np
import pytest

from dataflex_jax.reporting.page import write_report
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import PROJECT
from tests.helpers.command_line import parsed

STEPS = 3
_RECIPE = """
from pathlib import Path
from tests.helpers import tiny

def get_config(mixer="odm"):
    return tiny.config(Path({root!r}), mixer, train_step={steps})
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    return importlib.import_module("mapped_seeds")


@pytest.fixture
def recipe(tmp_path):
    root = tiny.write_domains(tmp_path / "domains")
    (tmp_path / "recipe.py").write_text(_RECIPE.format(root=str(root), steps=STEPS))
    return tmp_path / "recipe.py"


def run(script, recipe, folder):
    with parsed(f"--config={recipe}", "--seeds=1,3", f"--workdir={folder / 'mapped'}", command=script):
        script.main(["mapped_seeds"])


def test_each_seed_has_a_folder_for_the_report(script, recipe, tmp_path, monkeypatch):
    asked = []

    def losses(shared, members, targets):
        asked.extend(member.seed for member in members)
        return np.array([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]])

    monkeypatch.setattr(script, "train_and_measure", losses)
    run(script, recipe, tmp_path / "odm")
    assert asked == [1, 3]
    (line,) = tiny.records(tmp_path / "odm" / "seed3", "eval.jsonl")
    assert (line["step"], line["split"]) == (STEPS, "valid")
    assert {name: figures["nll"] for name, figures in line["domains"].items()} == {
        "code": 1.5,
        "digits": 2.5,
        "vowels": 3.5,
    }
    assert json.loads((tmp_path / "odm" / "seed3" / "config.json").read_text())["config"]["seed"] == 3
    assert (tmp_path / "odm" / "mapped" / "summary.json").exists()
    folders = [tmp_path / "odm" / f"seed{seed}" for seed in (1, 3)]
    write_report(folders, tmp_path / "report.html", files=tmp_path / "files")
    assert "| seed1 (of 2) | 2 |" in (tmp_path / "files" / "tables" / "results.md").read_text()


@pytest.mark.slow
def test_a_seeds_losses_are_those_of_a_run_alone(script, recipe, tmp_path):
    run(script, recipe, tmp_path / "odm")
    train_and_evaluate(tiny.config(tmp_path / "domains", train_step=STEPS, seed=3), tmp_path / "alone")
    ours, theirs = (
        tiny.records(folder, "eval.jsonl")[-1] for folder in (tmp_path / "odm" / "seed3", tmp_path / "alone")
    )
    assert ours.keys() == theirs.keys()
    for name, figures in theirs["domains"].items():
        assert ours["domains"][name] == pytest.approx(figures, rel=1e-5)
    assert ours["overall"] == pytest.approx(theirs["overall"], rel=1e-5)
