"""gpu.sh with a stand-in for Python: which parts run, what a second call leaves out, and what of a part that fails."""

import os
import subprocess

import pytest

from tests.scripts.test_bench import SCRIPTS

PARTS = ("tests", "train_speed", "per_example_gradients", "less", "step", "resume")
# Writes what gpu_setup.py and the benchmarks write; fails or hangs in the parts that FAILS and HANGS name.
STAND_IN = """#!/usr/bin/env bash
name=$(basename "$1" .py)
if [ "$name" = gpu_setup ]; then echo -n "$CARD" >"$2/card"; echo -n "$CODE" >"$2/code"; exit; fi
echo "$name" >>"$CALLS"
[ "$name" = "$FAILS" ] && { echo "no memory"; exit 3; }
[ "$name" = "$HANGS" ] && exec sleep 60
last=${!#}
echo "{}" >"${last#--output=}"
"""


@pytest.fixture
def gpu(tmp_path):
    """Calls gpu.sh; returns its code, what it printed and the parts that it ran."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def call(*arguments, card="nvidia-h100", code="1", fails="", hangs=""):
        calls = tmp_path / "calls"
        calls.write_text("")
        variables = {"CARD": card, "CODE": code, "FAILS": fails, "HANGS": hangs, "CALLS": str(calls)}
        command = [SCRIPTS / "gpu.sh", f"--python={python}", f"--output={tmp_path / 'results'}", *arguments]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        ran = ["tests" if name == "gpu_tests" else name for name in calls.read_text().split()]
        return done.returncode, done.stdout + done.stderr, tuple(ran)

    return call


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


def test_without_a_gpu_only_the_small_sizes_run(gpu):
    code, said, ran = gpu(card="cpu")
    assert (code, ran) == (2, ())
    assert said == "error: no GPU here; --small shows on a CPU that all parts run\n"
    assert gpu("--small", card="cpu")[2] == PARTS
    code, said, ran = gpu("--smal")
    assert (code, ran) == (2, ())
    assert said.startswith("error: --smal: accepted are --small")


def test_what_is_missing_is_named_with_the_way_to_carry_it(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_setup

    monkeypatch.setattr(gpu_setup, "PEER", ("no-such-package", "numpy"))
    assert "no-such-package" in gpu_setup.missing()
    monkeypatch.setattr(gpu_setup, "missing", lambda: ["grain", "ml_collections"])
    with pytest.raises(
        SystemExit, match=r"lacks grain ml_collections\. (.|\n)*--find-links=wheels grain ml_collections$"
    ):
        gpu_setup.main()
    assert len(gpu_setup.digest()) == 64
