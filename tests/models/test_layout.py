"""The table of parameters: complete, without ambiguity, with Hugging Face's names and the rules written out."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors import safe_open

from dataflex_jax.models import decoder, layout, parts
from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.hf.config import from_hf
from tests.models.make_golden import GOLDEN, MODELS
from tests.models.make_golden_peft import FOLDER

QKV, GATED = ("attention/q_proj", "attention/k_proj", "attention/v_proj"), ("mlp/gate_proj", "mlp/up_proj")
GATES, MIXTURES = ("gate_proj", "up_proj"), ("mlp", "block_sparse_moe")
EXPERTS = ("expert", "fsdp")
BACK = ("attention/o_proj", "mlp/down_proj")
# The whole of the table's rules, by hand.
RULES = {
    "embed_tokens/embedding": P("tensor", "fsdp"),
    "lm_head/kernel": P("fsdp", "tensor"),
    "norm/scale": P(None),
    "layers/input_layernorm/scale": P(None, None),
    "layers/post_attention_layernorm/scale": P(None, None),
    "layers/attention/q_norm/scale": P(None, None),
    "layers/attention/k_norm/scale": P(None, None),
    "layers/attention/o_proj/bias": P(None, None),
    **{f"layers/{name}/bias": P(None, "tensor") for name in QKV},
    **{f"layers/{name}/kernel": P(None, "fsdp", "tensor") for name in QKV + GATED},
    **{f"layers/{name}/lora_a": P(None, None, None) for name in QKV + GATED},
    **{f"layers/{name}/lora_b": P(None, None, "tensor") for name in QKV + GATED},
    **{f"layers/{name}/kernel": P(None, ("tensor", "fsdp"), None) for name in BACK},
    **{f"layers/{name}/lora_a": P(None, "tensor", None) for name in BACK},
    **{f"layers/{name}/lora_b": P(None, None, None) for name in BACK},
    **{f"layers/{block}/router/kernel": P(None, None, None) for block in MIXTURES},
    **{f"layers/{block}/experts/{name}": P(None, EXPERTS, "fsdp", "tensor") for block in MIXTURES for name in GATES},
    **{f"layers/{block}/experts/down_proj": P(None, EXPERTS, "tensor", "fsdp") for block in MIXTURES},
    **{f"layers/{block}/experts/{name}_lora_a": P(None, EXPERTS, None, None) for block in MIXTURES for name in GATES},
    **{
        f"layers/{block}/experts/{name}_lora_b": P(None, EXPERTS, None, "tensor")
        for block in MIXTURES
        for name in GATES
    },
    **{f"layers/{block}/experts/down_proj_lora_a": P(None, EXPERTS, "tensor", None) for block in MIXTURES},
    **{f"layers/{block}/experts/down_proj_lora_b": P(None, EXPERTS, None, None) for block in MIXTURES},
    **{f"layers/mlp/shared_expert/{name}/kernel": P(None, "fsdp", "tensor") for name in GATES},
    "layers/mlp/shared_expert/down_proj/kernel": P(None, ("tensor", "fsdp"), None),
    "layers/mlp/shared_expert_gate/kernel": P(None, None, None),
}


@functools.cache
def shapes(name):
    """The parameters of a golden model with adapters everywhere, by path."""
    cfg = dataclasses.replace(from_hf(MODELS[name]), lora=LoraConfig(rank=3, target_modules=layout.LORA_MODULES))
    params = jax.eval_shape(lambda: decoder.create(cfg, jax.random.key(0))[1])
    return dict(parts.leaves(params))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_exactly_one_row(name):
    for path, leaf in shapes(name).items():
        (row,) = (row for row in layout.TABLE if row.path == path)
        assert layout.row(path) is row
        assert len(row.axes) == leaf.ndim, path
        assert row.stacked == path.startswith(layout.LAYERS) + row.routed, path


def test_every_row_is_of_a_parameter_of_some_family():
    assert {row.path for row in layout.TABLE} == set().union(*map(shapes, MODELS))


def test_the_rules_are_these():
    assert dict(layout.RULES) == RULES


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_transformers(name):
    golden = json.loads((GOLDEN / "hf_tensors.json").read_text())[name]
    rows = [layout.row(path) for path in shapes(name) if not layout.row(path).factor]
    numbers = range(MODELS[name]["num_hidden_layers"])
    experts = range(from_hf(MODELS[name]).num_experts or 1)
    found = {row.hf.format(i, e) for row in rows for i in (numbers if row.stacked else [0]) for e in experts}
    assert found == set(golden)


def test_names_of_factors_are_those_of_peft():
    with safe_open(FOLDER / "adapter_model.safetensors", "np") as file:
        golden = {name.replace(".0.", ".{}.").replace(".1.", ".{}.") for name in file.keys()}  # noqa: SIM118
    assert golden <= {row.hf for factors in layout.ADAPTERS.values() for row in factors.values()}
    assert layout.ADAPTERS["up_proj"]["lora_b"].hf == "base_model.model.model.layers.{}.mlp.up_proj.lora_B.weight"


def test_kinds_of_rows():
    # Dropout keys go by this order.
    assert layout.LORA_MODULES == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linear = [row.path for row in layout.TABLE if row.linear]
    of_mixtures = {path for path in RULES if "router" in path or "shared" in path}
    assert set(linear) - of_mixtures == {
        f"layers/{name}/{kind}" for name in QKV + GATED + BACK for kind in ("kernel", *layout.FACTORS)
    }
    assert of_mixtures < set(linear)
    routed = {row.path for row in layout.TABLE if row.routed}
    names = [f"{name}{factor}" for name in (*GATES, "down_proj") for factor in ("", "_lora_a", "_lora_b")]
    assert routed == {f"layers/{block}/experts/{name}" for block in MIXTURES for name in names}
    assert {row.path for row in layout.TABLE if row.factor} == {path for path in RULES if parts.is_adapter(path)}
    for block, module, path in (
        (None, "up_proj", "layers/mlp/up_proj/lora_b"),
        ("mlp", "q_proj", "layers/attention/q_proj/lora_b"),
        ("block_sparse_moe", "up_proj", "layers/block_sparse_moe/experts/up_proj_lora_b"),
    ):
        assert layout.adapter(module, block)["lora_b"].path == path
        assert layout.adapted_module(path) == module
    assert all(map(layout.in_blocks, [*linear, *routed]))
    assert not any(map(layout.is_linear, routed))
    assert {row.path for row in layout.TABLE if row.float32} == {path for path in RULES if "router" in path}
    assert all(map(layout.is_linear, linear))
    assert not layout.is_linear("lm_head/kernel")
    assert not layout.is_linear("layers/mlp/other/kernel")
    matrices = {row.path for row in layout.TABLE if row.matrix}
    assert matrices == {*linear, *routed, "embed_tokens/embedding", "lm_head/kernel"}
    assert {row.path for row in layout.TABLE if row.transposed} == matrices - {"embed_tokens/embedding"}
    by_inputs = {row.path for row in layout.TABLE if row.split_by_inputs}
    down = {
        "layers/mlp/shared_expert/down_proj/kernel",
        *(path for path in routed if path.endswith(("down_proj", "down_proj_lora_a"))),
    }
    assert by_inputs - down == {f"layers/{name}/{kind}" for name in BACK for kind in ("kernel", "lora_a")}
    assert down < by_inputs
    with pytest.raises(KeyError, match="layers/mlp/other/kernel"):
        layout.row("layers/mlp/other/kernel")


def test_linear_widths_are_of_the_linear_layers():
    cfg = from_hf(MODELS["qwen3"])
    assert tuple(cfg.linear_widths()) == layout.LORA_MODULES
    factors = {path: leaf for path, leaf in shapes("qwen3").items() if parts.is_adapter(path)}
    assert len(factors) == 2 * len(layout.LORA_MODULES)
    for path, leaf in factors.items():
        inputs, outputs = cfg.linear_widths()[path.split("/")[-2]]
        assert leaf.shape == ((2, inputs, 3) if path.endswith("lora_a") else (2, 3, outputs))


def test_more_than_one_leading_axis_may_be_stacked(monkeypatch, tmp_path):
    """As experts, whose tensors have a layer and a number of their own."""
    from dataflex_jax.models.hf import weights
    from dataflex_jax.sharding import make_mesh

    axes = P(None, None, "fsdp", "tensor")
    expert = layout.Row("layers/mlp/experts/up_proj", axes, "model.layers.{}.mlp.experts.{}.up_proj.weight")
    monkeypatch.setitem(layout._ROWS, expert.path, expert)
    monkeypatch.setattr(layout, "RULES", ((expert.path, expert.axes), *layout.RULES))
    assert expert.matrix
    assert expert.transposed

    values = np.arange(2 * 3 * 8 * 4, dtype=np.float32).reshape(2, 3, 8, 4)
    params = {"layers": {"mlp": {"experts": {"up_proj": values}}}, "lm_head": {"kernel": values[0, 0]}}
    abstract = layout.placed(
        make_mesh({"fsdp": 4, "tensor": 2}), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    )
    assert abstract["layers"]["mlp"]["experts"]["up_proj"].sharding.spec == axes
    tensors = weights.hf_tensors(jax.tree.map(jax.numpy.asarray, params))
    assert [tensor.name for tensor in tensors[:2]] == ["lm_head.weight", "model.layers.0.mlp.experts.0.up_proj.weight"]
    by_name = {tensor.name: tensor for tensor in tensors}
    np.testing.assert_array_equal(by_name["model.layers.1.mlp.experts.2.up_proj.weight"].value(), values[1, 2].T)
    weights._write_shard(tmp_path / weights.WEIGHTS, tensors, np.dtype("float32"))
    loaded = weights.load_params(str(tmp_path), abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
