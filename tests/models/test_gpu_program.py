"""The programs for an NVIDIA GPU, which JAX lowers on any machine: what is in them before a GPU was ever there.

JAX asks the GPU's libraries which cuDNN they hold; here it is told.
"""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dataflex_jax import sharding
from dataflex_jax.models import parts
from dataflex_jax.models.config import REMAT_POLICIES, LoraConfig, ModelConfig
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.generation.generate import generate
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.sharding import batch_sharding, make_mesh
from dataflex_jax.signals.gradients import gradient_features, gradient_norms
from tests.helpers.tiny_model import batch_of

CONFIG = {
    "architecture": "qwen2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# From which Pallas takes for which card a kernel is. With it no program may have cuDNN's attention.
H100 = AbstractMesh((1,), ("card",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
BATCH = batch_of(jnp.zeros((8, 129), jnp.int32))


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")
    mesh = SimpleNamespace(empty=False, devices=np.array([gpu]))
    monkeypatch.setattr(sharding, "get_concrete_mesh", lambda: mesh)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)


def build(**fields):
    return Model.random(ModelConfig(**(CONFIG | fields)), jax.random.key(0))


@jax.value_and_grad
def loss_and_gradient(params, model, batch):
    """Of the trained parameters, as the train step computes it."""
    model = model.with_params(params)
    return jnp.mean(model.token_losses(batch, Hooks(frozen_head=model.head_is_frozen)).losses)


def program(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def attentions(text: str) -> tuple[int, int]:
    """How often cuDNN's attention is in a program: (forward, backward); the layers are one loop."""
    calls = re.findall(r"custom_call @(__cudnn\$fmha\w*)", text)
    backward = sum(call.endswith("Backward") for call in calls)
    return len(calls) - backward, backward


def products(text: str) -> set[tuple[str, str, str]]:
    """Types of the operands and the result of all matrix products."""
    array = r"tensor<(?:\d+x)*([a-z]\w*)>"
    return set(re.findall(rf"dot_general .*: \({array}, {array}\) -> {array}", text))


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_attention_is_cudnns_and_is_computed_again_only_where_nothing_is_kept(remat):
    model = build(remat=remat)
    text = program(loss_and_gradient, model.params, model, BATCH)
    assert attentions(text) == ((2, 1) if remat == "full" else (1, 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "qwen3", "head_dim": 64},
        {"architecture": "mistral", "sliding_window": 64},
        {"architecture": "llama", "tie_word_embeddings": True},
    ],
    ids=lambda fields: fields["architecture"],
)
def test_training_multiplies_bfloat16_only(fields):
    model = build(**fields)
    text = program(loss_and_gradient, model.params, model, BATCH)
    assert attentions(text) == (2, 1)
    # The cross-entropy's logits and its weight's gradient are accumulated in float32.
    assert products(text) == {("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32")}


def test_adapters_too_and_their_frozen_base_has_no_gradient():
    model = build(lora=LoraConfig(rank=8)).training(parts.is_adapter)
    text = program(loss_and_gradient, model.params, model, BATCH)
    assert attentions(text) == (2, 1)
    assert products(text) == {("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32")}
    assert not re.search(r"dot_general .*-> tensor<(256x512|512x256|256x256|256x128)xbf16>", text)


@pytest.mark.parametrize("method", ["sketch", "kronecker"])
def test_per_example_gradients_run_on_cudnns_attention_too(method):
    model = build()
    text = program(gradient_features(Projection(method, 64)), model, BATCH)
    assert attentions(text) == (2, 1)
    assert attentions(program(gradient_norms(), model, BATCH)) == (2, 1)


def test_a_mesh_splits_it_by_rows_and_heads():
    model = build()
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, param_shardings(mesh, model))
        batch = jax.device_put(BATCH, batch_sharding(mesh))
        text = program(loss_and_gradient, placed.params, placed, batch)
    assert attentions(text) == (0, 0)
    assert text.count("CustomSPMDPartitioning") == 3


@functools.cache
def kept(remat):
    """[(dtype, shape)] of what the scan over the layers keeps for the backward pass, beside the parameters."""
    model = build(remat=remat, dtype="bfloat16")

    def backward(params):
        return jax.vjp(lambda params: loss_of(model.with_params(params)), params)[1]

    parameters = {leaf.shape for leaf in jax.tree.leaves(model.params)}
    leaves = jax.tree.leaves(jax.eval_shape(backward, model.params))
    return [(leaf.dtype, leaf.shape) for leaf in leaves if leaf.ndim > 2 and leaf.shape not in parameters]


def loss_of(model):
    return jnp.mean(model.token_losses(BATCH).losses)


def test_a_half_precision_model_keeps_no_float32_step_between_two_products():
    sizes = {}
    for remat in REMAT_POLICIES:
        layers = [(dtype, shape) for dtype, shape in kept(remat) if shape[0] == CONFIG["num_hidden_layers"]]
        sizes[remat] = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layers)
        # Attention's statistics are [layers, B, N, T].
        statistics = (3, 8, CONFIG["num_attention_heads"], 128)
        assert all(dtype == jnp.bfloat16 or shape == statistics for dtype, shape in layers), remat
    assert sizes["none"] == sizes["dots"] > sizes["attention"] > sizes["full"] > 0


def test_tokens_are_generated_without_a_copy_of_each_layers_weights():
    """The pass over the prompts takes a layer's stored weights out of all layers', in the loop over tokens none are."""
    model, prompts = build(), jnp.zeros((8, 16), jnp.int32)

    def sliced(model):
        text = program(functools.partial(generate, max_new_tokens=4), model, prompts, jnp.full(8, 16))
        return set(re.findall(r"dynamic_slice .*: \(tensor<3x256x(?:\d+)x(\w+)>", text))

    assert sliced(model) == {"f32"}
    mesh = make_mesh({"fsdp": 8})  # whose gathers make the copy
    with jax.set_mesh(mesh):
        assert sliced(jax.device_put(model, param_shardings(mesh, model))) == {"bf16"}


MIXTURE = {"architecture": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def test_experts_products_are_kernels_and_no_array_has_all_experts_of_all_tokens():
    model = build(attention="xla", **MIXTURE)
    with use_abstract_mesh(H100):
        text = program(loss_and_gradient, model.params, model, BATCH)
    names = re.findall(r'@__gpu\$xla.gpu.triton.*?name = "(\w+)"', text)
    # Three forward, gate and up again backward, and three for the gradients of the inputs; three of the weights.
    assert (names.count("grouped_product"), names.count("grouped_outer")) == (8, 3)
    largest = max(
        np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+)bf16>", text)
    )
    assert largest < BATCH.mask.size * MIXTURE["num_experts"] * MIXTURE["moe_intermediate_size"]


def test_experts_of_other_widths_are_computed_block_by_block():
    model = build(**MIXTURE | {"moe_intermediate_size": 24})
    assert "xla.gpu.triton" not in program(loss_and_gradient, model.params, model, BATCH)
