"""The benchmarks of the train step and of the cross-entropy at a tiny size: what they write, not how fast they are."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from tests.scripts.test_bench import MACHINE, SCRIPTS, run

TINY = ("--shape=tiny", "--seq_len=16", "--rounds=2", "--block=1", "--sweep_steps=1")


def test_train_speed_pairs_both_sides_and_tries_variants(tmp_path):
    pytest.importorskip("torch", reason="the other side is PyTorch's")
    output = tmp_path / "train_speed.json"
    options = ("--batch=2", "--scan_layers=false", "--peer_checkpointing=false,true")
    run("train_speed.py", *TINY, *options, f"--output={output}")
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert (result["shape"], result["dtype"], result["seq_len"]) == ("tiny", "float32", 16)
    for side in ("ours", "peer"):
        measured = result[side]
        rates = measured["tokens_per_second"]
        assert len(rates["values"]) == 2
        assert min(rates["values"]) > 0
        np.testing.assert_allclose(measured["teraflops"] * 1e12, rates["median"] * result["flops_per_token"])
        assert measured["mfu"] is None  # a CPU's peak is not known
        assert measured["peak_memory"]["of"] == "process"
        assert measured["peak_memory"]["bytes"] > 100e6
    ratios = np.divide(*(result[side]["tokens_per_second"]["values"] for side in ("ours", "peer")))
    np.testing.assert_allclose(result["ours_over_peer"]["values"], ratios)
    assert [(entry["side"], entry["checkpointing"]) for entry in result["sweep"]] == [("peer", False), ("peer", True)]
    best = max(result["sweep"], key=lambda entry: entry["tokens_per_second"])
    options = {"batch": 2, "checkpointing": best["checkpointing"], "attention": "auto", "compile": False}
    assert result["peer"]["options"] == options
    assert result["ours"]["options"] == {
        "batch": 2,
        "remat": "none",
        "scan_layers": False,
        "tile_tokens": 2048,
        "attention": "auto",
    }
    page = (tmp_path / "README.md").read_text()
    assert "| [train_speed](train_speed.json) | tiny | 16 |" in page


def test_train_speed_says_why_a_side_cannot_run():
    pytest.importorskip("torch", reason="the other side is PyTorch's")
    message = run("train_speed.py", *TINY, "--batch=2", "--remat=some", code=1)
    assert "InputError: config.model.remat = 'some'" in message or "InputError: model remat='some'" in message
    assert "Traceback" not in message
    message = run("train_speed.py", *TINY, "--batch=2,x", code=2)
    assert "error: --batch: 'x' is not accepted; a list of integers >= 1 is" in message


def test_train_speed_without_a_peer_is_ours_alone(tmp_path):
    output = tmp_path / "train_speed.json"
    run("train_speed.py", *TINY, "--batch=2", "--nopeer", "--restart", "--seconds=0", f"--output={output}")
    result = json.loads(output.read_text())
    assert (result["peer"], result["peer_versions"], result["ours_over_peer"]) == (None, None, None)
    assert (result["rounds"], len(result["ours"]["tokens_per_second"]["values"])) == (
        1,
        1,
    )  # there is time for no other
    page = (tmp_path / "README.md").read_text()
    assert re.search(r"\| \[train_speed\]\(train_speed\.json\) \| tiny \| 16 \|.*\| - \| - \| - \| - \| - \|\n", page)


def test_train_speed_tries_variants_in_half_of_its_time_and_one_in_any_case(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_speed

    now = [100.0]

    class Side:
        """Takes ten seconds; of no memory with remat none."""

        peak = (1, "device")

        def __init__(self, name, task):
            now[0] += 10
            self.options = task["options"]
            if self.options["remat"] == "none":
                raise train_speed.Failed("no memory")

        def rate(self, steps):
            return float(self.options["batch"])

        def close(self):
            pass

    monkeypatch.setattr(train_speed, "Side", Side)
    monkeypatch.setattr(train_speed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train_speed, "flags", SimpleNamespace(FLAGS=SimpleNamespace(sweep_steps=1)))
    variants = [{"batch": batch, "remat": remat} for batch in (1, 2, 3) for remat in ("none", "dots")]

    def tried(seconds):
        best, entries = train_speed.fastest("ours", {}, variants, train_speed.Clock(seconds))
        return best, [entry.get("error", "")[:9] for entry in entries]

    assert tried(None) == (variants[5], ["no memory", "", "no memory", "", "no memory", ""])
    assert tried(70) == (variants[3], ["no memory", "", "no memory", "", "not tried", "not tried"])
    assert tried(1) == (variants[1], ["no memory", "", *["not tried"] * 4])
    clock = train_speed.Clock(30)
    assert (clock.has(30), clock.has(31)) == (True, False)


@pytest.mark.slow
def test_cross_entropy_compares_memory_and_time_of_the_forms(tmp_path):
    output = tmp_path / "cross_entropy.json"
    sizes = ("--vocab=3000", "--hidden=16", "--tokens=256", "--full_tokens=2048", "--tile_tokens=64,128", "--rounds=2")
    run("cross_entropy.py", *sizes, f"--output={output}")
    result = json.loads(output.read_text())
    assert result.keys() >= MACHINE
    assert (result["vocab"], result["tokens"], result["hidden"], result["dtype"]) == (3000, 256, 16, "float32")
    materialised, *tiled = result["forms"]
    assert [form["form"] for form in result["forms"]] == ["materialised", 64, 128]
    assert materialised["time_over_materialised"]["values"] == [1.0, 1.0]
    # All logits, 4 bytes each, and of the tiled forms no more than a few tiles' beside the weight's gradient.
    assert materialised["compiled_bytes"] >= 4 * 256 * 3000
    assert materialised["full_compiled_bytes"] >= 4 * 2048 * 3000
    for form in tiled:
        assert form["full_compiled_bytes"] < materialised["full_compiled_bytes"] / 4
        seconds, base = form["seconds"]["values"], materialised["seconds"]["values"]
        np.testing.assert_allclose(form["time_over_materialised"]["values"], np.divide(seconds, base))
        assert (len(seconds), form["measured_of"]) == (2, "process")
    assert "| tiles of 64 |" in (tmp_path / "README.md").read_text()
    message = run("cross_entropy.py", "--tile_tokens=64,no", code=2)
    assert "error: --tile_tokens=64,no: must be a list of integers >= 1" in message
