"""scripts/doremi.py as a user runs it: three runs, one after the other, and what it leaves."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.command import PROJECT, Trainer
from tests.helpers.synthetic_run import add_evaluation, write_run

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
DATA = {"source": "local", "tokenizer": "bytes", "seq_len": 16, "batch_size": 8, "valid_fraction": 0.2}
RUN = {"train_step": 6, "warmup_step": 0, "log_every": 1, "checkpoint_every": 6, "eval_every": 0, "tensorboard": False}
NAMES = sorted(tiny.DOMAINS)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


def doremi(trainer, workdir, *own, overrides=(), code=0):
    """What the script printed."""
    data = DATA | {"root": trainer.root, "cache_dir": trainer.folder / "cache"}
    fields = {f"model.{name}": value for name, value in MODEL.items()} | RUN
    fields |= {f"data.{name}": value for name, value in data.items()}
    command = [sys.executable, str(PROJECT / "scripts/doremi.py"), f"--workdir={workdir}", *own, "--"]
    command += [*(f"--config.{name}={value}" for name, value in fields.items()), *overrides]
    environment = trainer.environment(1, {})
    done = subprocess.run(
        command, cwd=trainer.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


def last(folder, name):
    return tiny.records(folder, f"{name}.jsonl")[-1]


@pytest.mark.slow
def test_three_runs_a_table_and_nothing_twice(trainer, tmp_path):
    workdir = tmp_path / "doremi"
    printed = doremi(trainer, workdir)
    assert sorted(path.name for path in workdir.iterdir()) == ["doremi.json", "proxy", "reference", "target"]
    weights = json.loads((workdir / "proxy" / "domain_weights.json").read_text())
    assert (weights["mixer"], weights["step"]) == ("doremi", 6)
    of_target = last(workdir / "target", "policy")["observed"]["drawn_with"]
    np.testing.assert_allclose([of_target[n] for n in NAMES], [weights["domains"][n] for n in NAMES], rtol=1e-6)
    of_proxy = last(workdir / "proxy", "policy")
    average = np.array([of_proxy["state"]["alpha_sum"][name] for name in NAMES]) / 6
    np.testing.assert_allclose([weights["domains"][n] for n in NAMES], average, rtol=1e-5)

    rows = json.loads((workdir / "doremi.json").read_text())
    assert list(rows) == [*NAMES, "overall"]
    for role, column in (("reference", "baseline nll"), ("target", "target nll")):
        evaluation = last(workdir / role, "eval")
        assert rows["overall"][column] == evaluation["overall"]["nll"]
        assert {name: rows[name][column] for name in NAMES} == {
            name: figures["nll"] for name, figures in evaluation["domains"].items()
        }
    for name in NAMES:
        assert rows[name]["DoReMi weights"] == of_target[name]
        line = re.search(rf"^{name} .*$", printed, re.MULTILINE)[0].split()[1:]
        assert line == [f"{value:.4f}" for value in rows[name].values()]

    changed = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.jsonl")}
    again = doremi(trainer, workdir)
    assert [line.split(":")[1].split(",")[0].strip() for line in again.splitlines()[:3]] == ["done"] * 3
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.jsonl")} == changed


def test_the_last_evaluation_on_held_out_rows_counts(trainer, tmp_path):
    """Not what other evaluators found after it."""
    run = write_run(tmp_path / "run")
    held_out = last(run, "eval")
    add_evaluation(run, "algebra", accuracy=0.5)
    code = "import doremi, json, pathlib, sys; print(json.dumps(doremi.final(pathlib.Path(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        cwd=PROJECT / "scripts",
        env=trainer.environment(1, {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == held_out


def test_a_run_that_fails_is_named(trainer, tmp_path):
    message = doremi(trainer, tmp_path / "doremi", "--reference=--config.model.hidden_size=0", code=1)
    assert "error: config.model.hidden_size = 0" in message
    assert "the reference run ended with exit code 2; the same command goes on from there" in message
    assert "Traceback" not in message


@pytest.mark.slow
def test_rounds_until_the_weights_settle_and_a_larger_target(trainer, tmp_path):
    workdir = tmp_path / "doremi"
    larger = ("--target=--config.model.hidden_size=32", "--proxy=--config.mixer.reference_losses=cached")
    printed = doremi(trainer, workdir, "--rounds=4", "--threshold=1", *larger, overrides=("--config.train_step=4",))
    assert "round 2: the weights moved by at most" in printed
    assert sorted(path.name for path in workdir.iterdir()) == ["baseline", "doremi.json", "round1", "round2", "target"]
    first = json.loads((workdir / "round1" / "proxy" / "domain_weights.json").read_text())["domains"]
    second = last(workdir / "round2" / "reference", "policy")["observed"]["drawn_with"]
    np.testing.assert_allclose([second[n] for n in NAMES], [first[n] for n in NAMES], rtol=1e-6)
    for role, width in (("target", 32), ("baseline", 32), ("round2/proxy", 16)):
        assert json.loads((workdir / role / "config.json").read_text())["config"]["model"]["hidden_size"] == width
    natural = last(workdir / "baseline", "policy")["observed"]["drawn_with"]
    rows = json.loads((workdir / "doremi.json").read_text())
    assert {name: rows[name]["baseline proportions"] for name in NAMES} == natural
    assert os.path.isdir(trainer.folder / "cache" / "reference_losses")
