"""Adapters of experts: beside the merged model, over a mesh, in PEFT's files, and one row at a time."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from dataflex_jax.errors import InputError
from dataflex_jax.models import dispatch, parts
from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.hf import peft
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.policies import Projection
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.gradients import gradient_features
from dataflex_jax.signals.projections import project
from dataflex_jax.signals.rows import alone, named_leaves, row_loss
from tests.helpers.tiny_model import batch_of, build, random_tokens
from tests.models.make_golden import MODELS

MODULES = ("q_proj", "gate_proj", "down_proj")
LORA = LoraConfig(rank=3, alpha=6, target_modules=MODULES)


def config(name="mixtral"):
    fields = {"vocab_size": 64, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return from_hf(MODELS[name] | fields, dtype="float32", lora=LORA)


@pytest.fixture(scope="module")
def model():
    return build(config())


@functools.partial(jax.jit, static_argnums=2)
def value_and_gradient(model, tokens, shape):
    def loss(params):
        return shape.having(params, model.frozen).token_losses(batch_of(tokens)).losses.mean()

    return jax.value_and_grad(loss)(model.params)


def shape_of(model):
    return Model.shape(model.config)


def test_they_lie_beside_each_experts_kernel(model):
    cfg = model.config
    shapes = {path.removeprefix("layers/block_sparse_moe/experts/"): x.shape for path, x in parts.leaves(model.params)}
    hidden, width, experts = cfg.hidden_size, cfg.expert_width, cfg.num_experts
    assert shapes["gate_proj_lora_a"] == (1, experts, hidden, 3)
    assert shapes["gate_proj_lora_b"] == (1, experts, 3, width)
    assert shapes["down_proj_lora_a"] == (1, experts, width, 3)
    assert sum(np.prod(shape) for shape in shapes.values()) == cfg.num_lora_params()
    assert len(shapes) == 2 * len(MODULES)
    one = dataclasses.replace(cfg, num_experts_per_tok=1)
    adapters = 6 * 3 * 2 * (hidden + width)  # of one expert, in a token's FLOPs
    kernels = 4 * 3 * hidden * width
    assert cfg.flops_per_token(8) - one.flops_per_token(8) == (cfg.num_experts_per_tok - 1) * (adapters + kernels)


def test_the_merged_model_computes_the_same_and_its_gradient_is_theirs(model):
    tokens = random_tokens(2)
    loss, gradient = value_and_gradient(model, tokens, shape_of(model))
    merged = model.without_adapters()
    expected, of_kernels = value_and_gradient(merged, tokens, shape_of(merged))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (
        abs(
            loss
            - value_and_gradient(
                model.with_params(jax.tree.map(jnp.zeros_like, model.params)), tokens, shape_of(model)
            )[0]
        )
        > 1e-3
    )
    experts, of_kernels = (tree["layers"]["block_sparse_moe"]["experts"] for tree in (gradient, of_kernels))
    factors = model.params["layers"]["block_sparse_moe"]["experts"]
    for name in ("gate_proj", "down_proj"):
        a, b, slope = factors[f"{name}_lora_a"], factors[f"{name}_lora_b"], of_kernels[name]
        scale = LORA.scale
        np.testing.assert_allclose(experts[f"{name}_lora_a"], scale * slope @ np.swapaxes(b, 2, 3), atol=2e-5)
        np.testing.assert_allclose(experts[f"{name}_lora_b"], scale * np.swapaxes(a, 2, 3) @ slope, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 4}])
def test_over_a_mesh_they_are_the_same(model, axes):
    tokens = random_tokens(8)
    expected = value_and_gradient(model, tokens, shape_of(model))
    with jax.set_mesh(make_mesh(axes)) as _:
        mesh = make_mesh(axes)
        placed = model.having(*(jax.device_put(t, param_shardings(mesh, t)) for t in (model.params, model.frozen)))
        found = value_and_gradient(placed, tokens, shape_of(model))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


@pytest.mark.slow
def test_kernels_of_gpus_compute_the_same(monkeypatch):
    """Interpreted here; a rank of 3 is padded to what they take."""
    from tests.models.test_dispatch import random_mixture

    x, factors, experts, weights = random_mixture(20, 2, 4, hidden=16, width=32)
    rng = np.random.default_rng(2)
    shapes = {"gate": ((4, 16, 3), (4, 3, 32)), "down": ((4, 32, 3), (4, 3, 16))}
    pairs = {
        name: tuple(jnp.asarray(rng.normal(0, 0.3, s), jnp.float32) for s in pair) for name, pair in shapes.items()
    }
    weights = weights._replace(adapters=(pairs["gate"], (), pairs["down"]))

    def gradients():
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(dispatch.mixed(x, factors, experts, w))), (0, 1)))(
            x, weights
        )

    expected, sizes, mix = gradients(), dispatch._blocks, dispatch.swiglu
    monkeypatch.setattr(dispatch, "_blocks", lambda experts, number, _: sizes(experts, number, True))
    monkeypatch.setattr(dispatch, "swiglu", lambda *operands: mix(*operands[:-1], True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), gradients(), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_they_are_saved_by_pefts_names_and_come_back_bit_for_bit(tmp_path, name):
    model = build(config(name))
    peft.save_adapter(tmp_path / "adapter", LORA, model.params, None)
    block, names = ("block_sparse_moe", ("w1", "w2")) if name == "mixtral" else ("mlp", ("gate_proj", "down_proj"))
    written = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert written["target_modules"] == ["q_proj", *names]
    with safe_open(tmp_path / "adapter" / peft.WEIGHTS, "numpy") as file:
        tensor = file.get_tensor(f"base_model.model.model.layers.0.{block}.experts.2.{names[1]}.lora_A.weight")
        assert len(list(file.keys())) == 2 * (1 + 2 * model.config.num_experts)
    factor = model.params["layers"][block]["experts"]["down_proj_lora_a"]
    np.testing.assert_array_equal(tensor, np.asarray(factor[0, 2]).T)
    found, _ = peft.read_lora_config(str(tmp_path / "adapter"), "lora.name_or_path")
    assert found.target_modules == MODULES
    again = peft.load_adapter(str(tmp_path / "adapter"), model.config, "lora.name_or_path")
    jax.tree.map(np.testing.assert_array_equal, again, model.params)
    fewer = dataclasses.replace(model.config, num_experts=model.config.num_experts - 1)
    with pytest.raises(InputError, match="has no place in this base"):
        peft.load_adapter(str(tmp_path / "adapter"), fewer, "lora.name_or_path")


@pytest.mark.slow
def test_a_rows_gradient_is_that_of_the_row_alone(model):
    batch = batch_of(random_tokens(2, 6))
    projection = Projection("sketch", 32)
    found = jax.jit(gradient_features(projection))(model, batch)

    @jax.jit
    def of_row(row):
        return jax.grad(lambda p: row_loss(model.with_params(p).token_losses(alone(row)).losses[0], row))(model.params)

    for b in range(2):
        row = jax.tree.map(lambda leaf, b=b: leaf[b], batch.rows_alone())
        images = [project(projection, path, 0, g[0]) for path, g in named_leaves(of_row(row)).items()]
        np.testing.assert_allclose(found[b], sum(images), atol=1e-4)
    with pytest.raises(InputError, match=r"experts/.*_proj_lora_a is of routed experts"):
        gradient_features(Projection("kronecker", 16))(model, batch)
