"""The benchmark scripts at a tiny size: what they write. Nothing here depends on speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.synthetic_run import add_evaluation, write_run

SCRIPTS = Path(__file__).parents[2] / "scripts/bench"
MODEL = (
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_hidden_layers=2",
    "--config.data.tokenizer=bytes",
    "--config.data.seq_len=32",
    "--config.data.batch_size=8",
    "--config.data.valid_fraction=0.2",
)
MACHINE = {"command", "date", "cpu", "cores", "devices", "versions", "git_revision", "modified_since"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture
def bench(monkeypatch):
    """The module that the scripts share."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results

    return results


def data(root: Path) -> tuple[str, ...]:
    cache_dir = root.parent / "cache"
    return "--config.data.source=local", f"--config.data.root={root}", f"--config.data.cache_dir={cache_dir}"


def run(script: str, *arguments: str, code: int = 0) -> str:
    """Runs a script in a process with one device; what it printed."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_step(root, tmp_path):
    output = tmp_path / "step.json"
    arguments = ("--rounds=2", "--block=4", "--loader_steps=3", f"--output={output}")
    run("step.py", "--config=configs/odm.py", *MODEL, *data(root), *arguments)
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert (result["mixer"], result["baseline"], result["batch_rows"], result["seq_len"]) == ("odm", "static", 8, 32)
    rates = result["tokens_per_second"]
    assert rates.keys() == {"static", "odm", "one batch on the device"}
    assert all(len(of_kind["values"]) == 2 and min(of_kind["values"]) > 0 for of_kind in rates.values())
    for name, of in (("mixer_over_baseline", "static"), ("mixer_over_bare", "one batch on the device")):
        expected = np.divide(rates["odm"]["values"], rates[of]["values"])
        np.testing.assert_allclose(result[name]["values"], expected)
    host, rows_per_second = result["host"], result["loader_rows_per_second"]["median"]
    np.testing.assert_allclose(result["loader_over_step"], rows_per_second / (8 / host["step_seconds"]))
    assert host["main_thread_busy_seconds"] > 0
    np.testing.assert_allclose(
        host["main_thread_idle_share"], 1 - host["main_thread_busy_seconds"] / host["step_seconds"]
    )
    page = (tmp_path / "README.md").read_text()
    assert "| [step](step.json): odm / static | qwen2 2 x 32 | 8 x 32 |" in page


def test_step_needs_another_mixer_than_the_baseline():
    message = run("step.py", "--config=configs/static.py", code=2)
    assert message == "error: --config: needs a recipe with another mixer than --baseline=static\n"


@pytest.mark.slow
def test_resume(root, tmp_path):
    output = tmp_path / "resume.json"
    arguments = ("--few=2", "--many=4", "--repeats=1", f"--output={output}")
    run("resume.py", *arguments, "--", *MODEL, *data(root)[:2])
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert result["fresh"]["steps_taken"] == result["very_first"]["steps_taken"] == 0
    assert 2 <= result["resumed_after_few"]["steps_taken"] < result["resumed_after_many"]["steps_taken"]
    for name in ("very_first", "fresh", "resumed_after_few", "resumed_after_many"):
        parts = result[name]["parts"]
        assert parts.keys() == {"data", "state", "first_step"}
        assert min(parts.values()) > 0
        np.testing.assert_allclose(sum(parts.values()), result[name]["seconds"]["median"])
    assert "| resumed after many |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_mixing(root, tmp_path):
    runs, output = tmp_path / "runs", tmp_path / "mixing.json"
    own = (f"--root={root}", "--seeds=3", f"--runs={runs}", f"--output={output}")
    overrides = ("--", "--config.data.domains=('digits','vowels','code')", *MODEL, data(root)[2])
    run("mixing.py", "--steps=4", *own, *overrides)
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert result["setting"]["tokens"] == 4 * 8 * 32
    rows = result["held_out_nll"]
    final = {
        mixer: json.loads((runs / f"{mixer}-seed3/eval.jsonl").read_text().splitlines()[-1])
        for mixer in ("static", "odm", "ado", "doremi")
    }
    for mixer, evaluation in final.items():
        nll = {name: figures["nll"] for name, figures in evaluation["domains"].items()}
        assert evaluation["step"] == 4
        assert {name: rows[name][mixer]["values"] for name in nll} == {name: [value] for name, value in nll.items()}
        assert rows["worst domain"][mixer]["mean"] == max(nll.values())
        np.testing.assert_allclose(rows["average domain"][mixer]["mean"], np.mean(list(nll.values())))
        assert rows["all tokens"][mixer]["mean"] == evaluation["overall"]["nll"]
    assert output.with_suffix(".png").stat().st_size > 10_000

    files = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    (tmp_path / "README.md").unlink()
    run("mixing.py", "--steps=4", *own, *overrides)
    assert "| worst domain |" in (tmp_path / "README.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")} == files

    message = run("mixing.py", "--steps=5", *own, *overrides, code=2)
    assert "static-seed3 holds a run with other settings" in message


def test_mixing_compares_held_out_losses(tmp_path):
    """Not what other evaluators found after them."""
    run_folder = write_run(tmp_path / "run")
    held_out = tiny.records(run_folder, "eval.jsonl")[-1]
    add_evaluation(run_folder, "algebra", accuracy=0.5)
    code = (
        "import json, mixing, sys; run = mixing.RunRecords.load(sys.argv[1]);"
        "print(json.dumps(mixing.compare({mixer: [run] for mixer in mixing.MIXERS})))"
    )
    command = [sys.executable, "-c", code, str(run_folder)]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, timeout=600, check=True)
    rows = json.loads(done.stdout)
    assert {name: rows[name]["odm"]["mean"] for name in held_out["domains"]} == {
        name: figures["nll"] for name, figures in held_out["domains"].items()
    }


def test_mixing_says_where_data_come_from():
    message = run("mixing.py", "--root=/no/such/folder", code=2)
    assert message.startswith("error: --root: no folder /no/such/folder; give one with commoncrawl.jsonl")
    assert message.count("\n") == 1


def test_comparison_has_means_deviations_and_signed_differences(bench):
    def column(mean, std):
        return {"mean": mean, "std": std}

    rows = {"book": {"static": column(5.0, 0.01), "odm": column(4.5, None), "odm - static": column(-0.5, 0.02)}}
    assert bench.comparison(rows).splitlines()[2] == "| book | 5.0000 ± 0.0100 | 4.5000 | -0.5000 ± 0.0200 |"


def test_page_without_results_gives_the_commands(bench, tmp_path):
    page = bench.page(tmp_path)
    for script in ("step", "train_speed", "cross_entropy", "less", "resume", "mixing"):
        assert f"Not measured yet: `python scripts/bench/{script}.py" in page


def test_spread(bench):
    spread = bench.spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert spread == {"median": 3.0, "quartiles": [2.0, 4.0], "range": [1.0, 5.0], "values": [4.0, 1.0, 2.0, 3.0, 5.0]}
