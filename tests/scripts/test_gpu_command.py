"""gpu.sh with a stand-in for Python: which parts run, what a second call leaves out, and what of a part that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from packaging.requirements import Requirement

from tests.helpers.command import PROJECT
from tests.scripts.test_bench import SCRIPTS

PARTS = ("tests", "train_speed", "less", "per_example_gradients", "step", "resume")
# Writes what gpu_setup.py and the benchmarks write; fails or hangs in the parts that FAILS and HANGS name.
STAND_IN = """#!/usr/bin/env bash
name=$(basename "$1" .py)
if [ "$name" = gpu_setup ]; then
    for known in card code peer; do variable=${known^^}; echo -n "${!variable}" >"$2/$known"; done
    exit
fi
echo "$name" >>"$CALLS"
echo "$*" >>"$CALLS.arguments"
[ "$name" = "$FAILS" ] && { echo "no memory"; exit 3; }
[ "$name" = "$HANGS" ] && { echo $$ >>"$CALLS.pid"; exec sleep 60; }
last=${!#}
echo "{}" >"${last#--output=}"
"""


class Gpu:
    """gpu.sh with the stand-in, and its results in a folder."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        self._python = folder / "python"
        self._python.write_text(STAND_IN)
        self._python.chmod(0o755)

    def start(self, *arguments, card="nvidia-h100", code="1", peer="yes", fails="", hangs="") -> subprocess.Popen:
        self.calls.write_text("")
        self.calls.with_suffix(".arguments").write_text("")
        variables = {"CARD": card, "CODE": code, "PEER": peer, "FAILS": fails, "HANGS": hangs, "CALLS": str(self.calls)}
        command = [SCRIPTS / "gpu.sh", f"--python={self._python}", f"--output={self.folder / 'results'}", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | variables
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __call__(self, *arguments, **variables):
        """(its code, what it printed, the parts that it ran)"""
        process = self.start(*arguments, **variables)
        said = process.communicate()[0]
        ran = ["tests" if name == "gpu_tests" else name for name in self.calls.read_text().split()]
        return process.returncode, said, tuple(ran)

    def arguments(self, part: str) -> str:
        """Of a part's command in the latest call."""
        lines = self.calls.with_suffix(".arguments").read_text().splitlines()
        return next(line for line in lines if f"{part}.py " in line)


@pytest.fixture
def gpu(tmp_path):
    return Gpu(tmp_path)


def test_every_part_runs_once_for_a_revision_of_the_code(gpu, tmp_path):
    code, said, ran = gpu()
    assert (code, ran) == (0, PARTS)
    assert f"all parts are in {tmp_path / 'results'}" in said
    assert {path.name for path in (tmp_path / "results").glob("*.json")} == {
        f"{name}-nvidia-h100.json" for name in PARTS
    }
    assert gpu()[2] == ()
    (tmp_path / "results/step-nvidia-h100.json").unlink()
    assert gpu()[2] == ("step",)
    assert gpu("--only=less,resume", code="2")[2] == ("less", "resume")
    assert gpu(code="2")[2] == ("tests", "train_speed", "per_example_gradients", "step")
    assert gpu("--only=less", card="nvidia-h200")[2] == ("less",)


def test_a_part_that_fails_is_named_and_the_rest_goes_on(gpu):
    code, said, ran = gpu(fails="less")
    assert (code, ran) == (1, PARTS)
    assert "less: failed (3)" in said
    assert "no memory" in said
    assert said.endswith("failed: less\n")
    code, said, ran = gpu("--patience=0.001", hangs="less")
    assert (code, ran) == (1, ("less",))
    assert "less: failed (124)" in said
    assert gpu()[2] == ("less",)


def test_paths_are_the_callers(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpu("--python=./python", "--output=brought/back", "--only=less")[2] == ("less",)
    assert (tmp_path / "brought/back/less-nvidia-h100.json").exists()


def test_what_there_is_no_time_for_is_left_to_the_next_call(gpu):
    code, said, ran = gpu("--minutes=1.4")
    assert (code, ran) == (1, ("tests", "less", "resume"))  # those that may be done in 84 s
    assert "train_speed: too little time is left" in said
    assert said.endswith("not begun: train_speed per_example_gradients step; the same command goes on with them\n")
    # The part ends at the limit, or by itself a little before.
    limit = re.search(r"tests: up to ([\d.]+) s", said)[1]
    assert 70 < float(limit) <= 84
    assert float(re.search(r"--seconds=([\d.]+)", gpu.arguments("gpu_tests"))[1]) == pytest.approx(0.85 * float(limit))
    code, said, ran = gpu()
    assert (code, ran) == (0, ("train_speed", "per_example_gradients", "step"))
    assert f"--seconds={0.85 * 460:g} " in gpu.arguments("train_speed")


def test_without_pytorch_nothing_is_compared(gpu):
    code, said, ran = gpu(peer="no")
    assert (code, ran) == (0, tuple(part for part in PARTS if part != "less"))
    assert "without PyTorch and PEFT: our train step alone" in said
    assert " --nopeer " in gpu.arguments("train_speed")
    assert gpu(code="2")[2] == PARTS
    assert "--peer_attention=cudnn,flash --peer_compile=false,true" in gpu.arguments("train_speed")


def test_a_call_that_is_stopped_ends_its_part_and_the_next_goes_on(gpu):
    process = gpu.start(hangs="less")
    pid_file = gpu.calls.with_suffix(".pid")
    while not pid_file.exists() or not pid_file.read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    pid = int(pid_file.read_text())
    ends = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert gpu()[2] == PARTS[PARTS.index("less") :]


def test_without_a_gpu_only_the_small_sizes_run(gpu):
    code, said, ran = gpu(card="cpu")
    assert (code, ran) == (2, ())
    assert said == "error: no GPU here; --small shows on a CPU that all parts run\n"
    assert gpu("--small", card="cpu")[2] == PARTS


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--smal", "error: --smal: accepted are --small"),
        ("--minutes=x", "error: x: must be a number"),
        ("--only=test", "error: --only: test: must be one of tests,"),
    ],
)
def test_a_wrong_argument_is_refused(gpu, argument, expected):
    code, said, ran = gpu(argument)
    assert (code, ran) == (2, ())
    assert said.startswith(expected)


@pytest.fixture
def gpu_setup(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_setup

    return gpu_setup


def test_what_is_missing_is_named_with_the_way_to_carry_it(gpu_setup, monkeypatch, tmp_path, capsys):
    assert gpu_setup.lacking(("no-such-package>=1", "numpy<1", 'other; sys_platform == "none"'))[0] == [
        "no-such-package"
    ]
    assert gpu_setup.lacking(("numpy<1",))[1] == [f"numpy {np.__version__}, not <1"]
    monkeypatch.setattr(gpu_setup, "needed", lambda: ("no-such-package", "another-one", "numpy"))
    with pytest.raises(SystemExit, match=r"lacks another-one no-such-package\.(.|\n)*--find-links=wheels another"):
        gpu_setup.main()
    monkeypatch.setattr(gpu_setup, "needed", lambda: ("numpy<1",))
    monkeypatch.setattr(gpu_setup, "PEER", ("no-such-package",))
    monkeypatch.setattr(sys, "argv", ["gpu_setup.py", str(tmp_path)])
    gpu_setup.main()
    said = capsys.readouterr().out
    assert f"other versions than the project asks for: numpy {np.__version__}, not <1\n" in said
    assert "to compare with PyTorch: this Python lacks no-such-package." in said
    assert {name: (tmp_path / name).read_text() for name in ("card", "code", "peer")} == {
        "card": "cpu",
        "code": f"{gpu_setup.digest()}-alone",
        "peer": "no",
    }


def test_training_needs_none_of_what_gpu_sh_does_without(gpu_setup):
    names = {Requirement(text).name for text in gpu_setup.needed()}
    assert names >= {"jax", "ml-collections", "pytest"}
    assert not names & set(gpu_setup.ELSEWHERE)
    hidden = ", ".join(f"{name!r}: None" for name in gpu_setup.ELSEWHERE)
    code = f"import sys; sys.modules |= {{{hidden}}}; import dataflex_jax.train, dataflex_jax.data.sources.table"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_what_came_of_each_test_is_written_as_it_ends(tmp_path):
    """So that it is there although the last one hangs."""
    (tmp_path / "test_some.py").write_text(
        "import pytest, time\n\n"
        "def test_good(): pass\n\n"
        "def test_bad(): assert 1 == 2\n\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no')\n\n"
        "def test_never_begun(broken): pass\n\n"
        "def test_hangs(): time.sleep(60)\n"
    )
    lines = tmp_path / "outcomes.jsonl"
    environment = os.environ | {"GPU_OUTCOMES": str(lines), "PYTHONPATH": str(SCRIPTS)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # those tests are of no worker
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_outcomes", "-p", "no:cacheprovider", "test_some.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not lines.exists() or lines.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["test"], line["outcome"]) for line in found] == [
        ("test_some.py::test_good", "passed"),
        ("test_some.py::test_bad", "failed"),
        ("test_some.py::test_never_begun", "failed"),
    ]
    assert [line.get("why") for line in found] == [None, "assert 1 == 2", "ValueError: no"]
    assert all(line["seconds"] >= 0 for line in found)


def test_the_tests_of_a_gpu_are_where_it_looks_for_them():
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import gpu_tests; print(*gpu_tests.files())"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"tests/gpu/test_programs.py", "tests/models/test_packed_attention.py"}
