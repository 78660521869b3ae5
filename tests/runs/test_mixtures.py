"""Mixtures of experts in whole runs: what dynamic_moe makes of a domain of its own kind, and experts over a mesh."""

import json
import random

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import policy_runs, tiny

EXPERTS = {"model__architecture": "olmoe", "model__num_experts": 8, "model__num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two domains of the same characters, and one of others."""
    folder = tmp_path_factory.mktemp("data") / "domains"
    folder.mkdir()
    for name, characters in {"digits": "0123456789 ", "figures": "0123456789 ", "code": "(){}[];=+-\n"}.items():
        rng = random.Random(name)
        lines = [json.dumps({"text": "".join(rng.choices(characters, k=200))}) for _ in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_domain_whose_tokens_use_other_experts_gains_weight(root, tmp_path):
    fields = {"train_step": 6, "eval_rows": 4, "mixer__eta": 2.0} | EXPERTS
    run = policy_runs.train(tmp_path / "run", root, "dynamic_moe", **fields)
    lines = tiny.records(run, "policy.jsonl")
    names = list(lines[0]["sampling_weights"])
    states = {
        field: np.array([[line["state"][field][name] for name in names] for line in lines], np.float64)
        for field in ("weights", "distance")
    }
    planted = names.index("code")
    assert (states["distance"].argmax(1) == planted).all()
    assert (np.diff(states["weights"][:, planted]) > 0).all()
    assert states["weights"][-1, planted] > 0.6
    # The trajectory is what policy.jsonl says.
    for before, distance, after in zip(
        states["weights"][:-1], states["distance"][1:], states["weights"][1:], strict=True
    ):
        moved = before * np.exp(2 * distance)
        np.testing.assert_allclose(after, 0.95 * moved / moved.sum() + 0.05 / 3, atol=1e-6)
    # So do the training batches' loads say it.
    last = tiny.records(run, "metrics.jsonl")[-1]["domain_router_load"]
    loads = {name: np.array(load) for name, load in last.items() if load is not None}
    for load in loads.values():
        assert load.shape == (8,)
        assert load.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_experts_over_a_mesh_train_the_same_model_and_go_on_over_another(root, tmp_path):
    fields = {"train_step": 4, "checkpoint_every": 2} | EXPERTS
    whole = policy_runs.train(tmp_path / "whole", root, "odm", **fields, mesh__fsdp=8)
    folder = policy_runs.train(tmp_path / "split", root, "odm", **fields, mesh__fsdp=2, mesh__expert=4)
    on = fields | {"train_step": 6}
    for run, mesh in ((whole, {"fsdp": 8}), (folder, {"fsdp": 2, "expert": 2, "tensor": 2})):
        axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
        train_and_evaluate(policy_runs.config(root, "odm", **on, **axes), run)
    losses = [[line["loss"] for line in tiny.records(run, "metrics.jsonl")] for run in (whole, folder)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_mesh_that_cannot_split_the_experts_is_refused_before_the_first_step(root, tmp_path):
    made = policy_runs.config(root, "odm", mesh__fsdp=-1, mesh__expert=2)
    with pytest.raises(InputError, match=r"config\.mesh\.expert = 2: .*'qwen2' is dense"):
        train_and_evaluate(made, tmp_path / "dense")
