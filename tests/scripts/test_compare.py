"""scripts/compare.py with a stand-in for the training command that takes a moment: what is run, skipped and named."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex_jax.errors import InputError
from tests.helpers.command import PROJECT
from tests.helpers.synthetic_run import write_run

# Copies a finished run into the run folder; with the variant "bad" it fails, with "slow" it waits for SIGTERM.
STAND_IN = """
import json, pathlib, shutil, signal, sys
arguments = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:])
folder = pathlib.Path(arguments["workdir"])
with open(folder.parent.parent / "begun", "a") as file:
    file.write(f"{folder.parent.name}/{folder.name}\\n")
variant = arguments["config"].partition(":")[2]
if variant == "bad" and not (folder / "mended").exists():
    print("one line\\nerror: --config.data.root=/nowhere: no such folder", file=sys.stderr)
    sys.exit(2)
if variant == "slow":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (folder / "waits").touch()
    signal.pause()
shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True)
config = json.loads((folder / "config.json").read_text())
config["config"]["seed"] = int(arguments["config.seed"])
config["config"]["recipe"] = arguments["config"]
(folder / "config.json").write_text(json.dumps(config))
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The script as a module, with the stand-in."""
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    module = importlib.import_module("compare")
    template = write_run(tmp_path / "template", steps=5, mixer=False)
    (template / "metrics.jsonl").unlink()
    monkeypatch.setattr(module, "TRAIN", (sys.executable, "-c", STAND_IN, str(template)))
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    return module


def never(step):
    return False


def begun(output):
    path = output / "begun"
    return path.read_text().split() if path.exists() else []


def test_every_recipe_and_seed_is_run_once_and_what_fails_is_named(compare, tmp_path, capsys):
    output = tmp_path / "out"
    runs = compare.planned(["configs/odm.py:local", "mine.py:bad"], [0, 1], output, ["--config.train_step=5"])
    failed = compare.train_all(runs, never)
    assert begun(output) == ["odm-local/seed0", "mine-bad/seed0", "odm-local/seed1", "mine-bad/seed1"]
    reason = "exit code 2, --config.data.root=/nowhere: no such folder"
    assert failed == {f"mine-bad/seed{n}": f"{reason} ({output / 'mine-bad' / f'seed{n}.log'})" for n in (0, 1)}
    assert f"mine-bad/seed0 failed: {reason}" in capsys.readouterr().err
    settings = json.loads((output / "odm-local" / "seed1" / "command.json").read_text())
    assert settings == ["--config=configs/odm.py:local", "--config.seed=1", "--config.train_step=5"]
    # The same again repeats what failed and nothing else.
    (output / "mine-bad" / "seed1" / "mended").touch()
    assert list(compare.train_all(runs, never)) == ["mine-bad/seed0"]
    assert begun(output)[4:] == ["mine-bad/seed0", "mine-bad/seed1"]


def test_mapped_seeds_are_one_run_a_recipe_and_never_among_others(compare, tmp_path):
    first, other = compare.planned(["a.py:x", "b.py"], [0, 4], tmp_path, ["--config.x=1"], mapped=True)
    assert (first.name, first.folder) == ("a-x/mapped", tmp_path / "a-x" / "mapped")
    assert first.settings == ["--config=a.py:x", "--seeds=0,4,", "--config.x=1"]
    assert other.results == [tmp_path / "b" / "seed0", tmp_path / "b" / "seed4"]
    (tmp_path / "b" / "seed4").mkdir(parents=True)
    with pytest.raises(InputError, match=r"b/seed4 was not made by this command with these settings"):
        compare.planned(["a.py:x", "b.py"], [0, 4], tmp_path, [], mapped=True)
    with pytest.raises(InputError, match=r"b/seed4 was not made by this command with these settings"):
        compare.planned(["b.py"], [4], tmp_path, [])


def test_a_request_to_stop_reaches_the_run_and_no_other_begins(compare, tmp_path):
    output = tmp_path / "out"
    runs = compare.planned(["a.py:slow", "b.py"], [0], output, [])
    assert compare.train_all(runs, lambda step: (runs[0].folder / "waits").exists()) == {}
    assert begun(output) == ["a-slow/seed0"]
    assert not any(run.is_finished for run in runs)


def test_progress_is_read_from_the_run_folder(compare, tmp_path):
    (run,) = compare.planned(["a.py"], [0], tmp_path / "out", [])
    assert compare._progress(run) == (0.0, "starts")
    write_run(run.folder, steps=8)
    assert compare._progress(run) == (1.0, "step 8 of 8")
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:30])
    assert compare._progress(run) == (0.25, "step 2 of 8")


@pytest.mark.parametrize(
    ("text", "recipes"),
    [
        ("configs/odm.py", ["configs/odm.py"]),
        (
            "configs/base.py:selector=less,sft,configs/odm.py:local",
            ["configs/base.py:selector=less,sft", "configs/odm.py:local"],
        ),
    ],
)
def test_variants_may_have_commas(compare, text, recipes):
    assert compare.list_of_recipes(text) == recipes


def test_seeds_are_how_many_or_which(compare):
    assert compare.list_of_seeds("3") == [0, 1, 2]
    assert compare.list_of_seeds("0,5,7") == [0, 5, 7]
    assert compare.list_of_seeds("7,") == [7]


def test_bad_input_is_one_line(compare, tmp_path):
    for call, message in (
        (lambda: compare.list_of_recipes(None), r"--recipes is missing, e\.g\."),
        (lambda: compare.list_of_recipes("odm,configs/static.py"), r"--recipes=.*: 'odm' is no recipe"),
        (lambda: compare.list_of_seeds("0"), r"--seeds=0: how many, as in 3, or which"),
        (lambda: compare.list_of_seeds("1,1"), r"--seeds=1,1: a seed is there twice"),
        (lambda: compare.planned(["a/odm.py", "b/odm.py"], [0], tmp_path, []), r"--recipes: 'odm' is there twice"),
        (lambda: compare.planned(["odm.py"], [0], tmp_path, ["--config.seed=3"]), r"--config\.seed=3: the seeds are"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    (tmp_path / "odm" / "seed0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"odm/seed0 was not made by this command with these settings"):
        compare.planned(["odm.py"], [0], tmp_path, [])


def test_fields_of_the_runs_come_after_the_scripts_own_flags(compare):
    given = ["--config.train_step=5", "--recipes=a.py", "--config.x=--", "--seeds=2"]
    assert compare.with_overrides_last(given) == ["--recipes=a.py", "--seeds=2", "--", given[0], given[2]]


@pytest.mark.slow
def test_the_command_trains_and_reports(tmp_path):
    """As a user runs it, with the real training command."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name} {i} " * 40}) + "\n" for i in range(60))
        (data / f"{name}.jsonl").write_text("".join(lines))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {f"model.{name}": value for name, value in small.items()} | {"model.num_key_value_heads": 2}
    fields |= {"data.root": data, "data.cache_dir": tmp_path / "cache", "data.tokenizer": "bytes", "data.seq_len": 16}
    fields |= {"data.batch_size": 8, "data.valid_fraction": 0.2, "train_step": 4, "eval_every": 2, "tensorboard": False}
    command = [sys.executable, PROJECT / "scripts/compare.py", "--recipes=configs/odm.py:local,configs/static.py:local"]
    command += ["--seeds=2", f"--output={tmp_path / 'out'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu"}
    written = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        written.append({path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/summary.json")})
    # Nothing is trained again.
    assert len(written[0]) == 4
    assert written[0] == written[1]
    assert done.stdout == f"Report:  {tmp_path / 'out' / 'report.html'}\n"
    results = Path(tmp_path / "out" / "report_files" / "tables" / "results.md").read_text()
    assert "| odm-local | 2 |" in results
    assert "| static-local | 2 |" in results
