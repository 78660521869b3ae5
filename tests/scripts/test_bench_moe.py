"""The benchmark of mixtures of experts at a tiny size: what is compared, and what it writes."""

import dataclasses
import json

import pytest

from tests.helpers.gpu_programs import needs_compiler
from tests.scripts.test_bench import MACHINE, SCRIPTS, run


@pytest.fixture
def script(monkeypatch):
    """The module of the script."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import moe

    return moe


def test_both_models_have_the_same_active_parameters(script):
    mixture, dense = script.models(script.SMALL).values()
    router = 6 * mixture.num_hidden_layers * mixture.hidden_size * mixture.num_experts
    assert mixture.flops_per_token(16) - dense.flops_per_token(16) == router
    assert dataclasses.replace(mixture, num_experts=2).num_params() - dense.num_params() == 2 * mixture.hidden_size


@pytest.mark.slow
def test_it_writes_both_times_and_their_ratio(tmp_path):
    output = tmp_path / "moe.json"
    printed = run("moe.py", "--small", "--rounds=3", "--steps=1", f"--output={output}")
    result = json.loads(output.read_text())
    assert set(result) >= MACHINE
    assert result["load_average"] > 0
    seconds, ratios = result["step_seconds"], result["mixture_over_dense"]["values"]
    for i in range(3):
        assert ratios[i] == pytest.approx(seconds["mixture"]["values"][i] / seconds["dense"]["values"][i])
    assert "mixture / dense: " in printed
    assert "2 of 8, 32 x 16" in (tmp_path / "README.md").read_text()
    assert "--top_k=9: must be at most --experts=8" in run("moe.py", "--top_k=9", "--experts=8", code=2)


@needs_compiler
@pytest.mark.slow
def test_of_a_card_it_writes_what_both_models_take(tmp_path):
    output = tmp_path / "moe-h100.json"
    sizes = ("--layers=1", "--experts=16", "--hidden=512", "--width=256", "--vocab=4096")
    printed = run("moe.py", "--device=h100", "--memory_limit=200", *sizes, f"--output={output}")
    result = json.loads(output.read_text())
    assert set(result) >= MACHINE
    assert result["sizes"] == {
        "hidden": 512,
        "layers": 1,
        "experts": 16,
        "top_k": 8,
        "width": 256,
        "vocab": 4096,
        "rows": 4,
        "seq_len": 2048,
    }
    mixture, dense = (sum(of_side["flops"].values()) for of_side in result["models"].values())
    assert result["flops_mixture_over_dense"] == mixture / dense
    assert 1 < mixture / dense < 1.1
    assert f"FLOPs mixture / dense: {mixture / dense:.3f}" in printed
    assert "8 of 16 experts, 1 layers of 512 x 256" in (tmp_path / "README.md").read_text()
