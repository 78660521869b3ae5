"""The benchmark of many models as one program at a tiny size: what it writes. Nothing here depends on speed."""

import json

import pytest

from tests.scripts.test_bench import MACHINE, run

_SIZE = ("--models=1M", "--counts=1,2", "--batch_rows=1", "--seq_len=8")


@pytest.mark.slow
def test_swarm(tmp_path):
    output = tmp_path / "swarm.json"
    run("swarm.py", *_SIZE, "--rounds=2", f"--output={output}")
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert result["parameters"] == {"1M": 1_050_752}
    for ways in result["models"]["1M"].values():
        assert list(ways) == ["one after another", "mapped", "vmap"]
        assert ways["one after another"]["over_one_after_another"]["values"] == [1.0, 1.0]
        for figures in ways.values():
            assert len(figures["models_times_tokens_per_second"]["values"]) == 2
    assert "| 1M | 2 |" in (tmp_path / "README.md").read_text()


def test_swarm_knows_its_models(tmp_path):
    message = run("swarm.py", "--models=7B", f"--output={tmp_path / 'swarm.json'}", code=2)
    assert "--models: '7B' is not one of 1M, 4M, 20M" in message
