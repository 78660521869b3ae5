"""scripts/bench/memory.py as it is called."""

import json
import os
import subprocess
import sys

import pytest

from dataflex_jax.aot import compiler
from tests.helpers.command import PROJECT
from tests.helpers.gpu_programs import needs_compiler

TINY = (
    "--config=configs/base.py:mixer=odm",
    "--config.model.hidden_size=128",
    "--config.model.intermediate_size=256",
    "--config.model.num_hidden_layers=1",
    "--config.model.num_attention_heads=2",
    "--config.model.num_key_value_heads=2",
    "--config.data.seq_len=64",
    "--config.data.batch_size=8",
    "--vocab_size=257",
)


def run(*arguments: str, code: int = 0) -> str:
    """What the script prints in a process of its own, of which no variable says that it is to use CPUs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "scripts/bench/memory.py", *TINY, *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_without_a_card_the_bytes_are_those_of_the_devices_here(tmp_path):
    said = run("--devices=4", f"--output={tmp_path / 'memory.json'}")
    assert "parameters on data 1, fsdp 4, expert 1, tensor 1 (cpu); GiB per device:" in said
    assert "an upper bound of a GPU's" in said
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
    parts = ("parameters", "optimizer", "batch", "results", "temporaries")
    assert found["peak"] == sum(found[part] for part in parts) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--sweep",), "error: --sweep needs --device, one of h100, h200, a100"),
        (("--program=scores",), "error: --program=scores: must be one of train, losses"),
        pytest.param(
            ("--device=h100",),
            "error: --device=h100: JAX's CUDA plugin is not installed",
            marks=pytest.mark.skipif(compiler.missing() is None, reason="it is installed"),
        ),
        pytest.param(("--device=h100", "--sweep", "--over=rows"), "error: --over=rows: must be", marks=needs_compiler),
        pytest.param(("--device=h100", "--devices=12"), "error: 12 devices: must be at most 8", marks=needs_compiler),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, expected):
    assert expected in run(*arguments, code=2)


@needs_compiler
@pytest.mark.slow
def test_a_card_that_is_not_here(tmp_path):
    said = run("--device=a100", "--devices=2")
    assert "(NVIDIA A100-SXM4-80GB); GiB per device:" in said
    assert "fits" in said
    assert "MFU" in said


@needs_compiler
@pytest.mark.slow
def test_a_sweep_names_the_best_that_fits_and_why_others_are_missing(tmp_path):
    over = ("--over=rows=1,2", "--over=mesh.tensor=1,3")
    said = run("--device=h100", "--devices=2", "--sweep", *over, f"--output={tmp_path / 'memory.json'}")
    assert "best: rows=2, mesh.tensor=1" in said
    result = json.loads((tmp_path / "memory.json").read_text())
    assert [row["fields"] for row in result["rows"]] == [
        {"rows": rows, "mesh.tensor": tensor} for rows in (1, 2) for tensor in (1, 3)
    ]
    assert result["rows"][1]["reason"].startswith("InputError: mesh.data=1, mesh.fsdp=-1, mesh.")
    assert result["best"] == [2]
    assert result["program"] == "train"
    page = (tmp_path / "README.md").read_text()
    assert "## What programs take of a card" in page
