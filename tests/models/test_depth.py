"""Layers that are written out one after the other are those that are scanned."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, moe
from dataflex_jax.models.config import REMAT_POLICIES, LoraConfig, ModelConfig
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import batch_sharding, make_mesh

slow = pytest.mark.slow
SHAPES = {
    "dense": {"architecture": "qwen2"},
    "mixture": {"architecture": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def config(shape="dense", **fields):
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "dtype": "float32",
    }
    return ModelConfig(**common | SHAPES[shape] | fields)


def value_and_grad(cfg, all_trained=True, written_out=True):
    """(losses and what layers say, gradients) of parameters and tokens."""
    graphdef, _ = jax.eval_shape(functools.partial(decoder.create, cfg), jax.random.key(0))

    def objective(params, tokens):
        of_router = None if cfg.mixture is None else moe.router_sums(2, jnp.ones(tokens[:, 1:].shape))
        hooks = Hooks(
            written_out=written_out, all_trained=all_trained, of_layer=lambda x: x.mean((1, 2)), of_router=of_router
        )
        losses, _, aux, _ = decoder.token_losses(graphdef, params, tokens, hooks=hooks)
        return losses.mean(), (losses, aux)

    return jax.value_and_grad(objective, has_aux=True)


def inputs(cfg):
    _, params = decoder.create(cfg, jax.random.key(0))
    return params, np.random.RandomState(0).randint(0, cfg.vocab_size, (8, 13))


@pytest.mark.parametrize(
    ("shape", "remat", "all_trained"),
    [
        ("dense", "dots", True),
        *(pytest.param("dense", remat, False, marks=slow) for remat in REMAT_POLICIES),
        *(pytest.param("dense", remat, True, marks=slow) for remat in REMAT_POLICIES if remat != "dots"),
        pytest.param("mixture", "dots", True, marks=slow),
        pytest.param("mixture", "dots", False, marks=slow),
    ],
)
def test_losses_gradients_and_what_layers_say_are_the_same(shape, remat, all_trained):
    params, tokens = inputs(config(shape))
    cfg = config(shape, remat=remat)
    expected = jax.jit(value_and_grad(cfg, written_out=False))(params, tokens)
    found = jax.jit(value_and_grad(cfg, all_trained))(params, tokens)
    jax.tree.map(close, found, expected)


@slow
def test_half_precision_rounds_at_the_same_places():
    params, tokens = inputs(config())
    cfg = config(dtype="bfloat16")
    (_, (expected, _)), _ = jax.jit(value_and_grad(cfg, written_out=False))(params, tokens)
    (_, (found, _)), _ = jax.jit(value_and_grad(cfg))(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ("dense", {"fsdp": 8}),
        pytest.param("dense", {"fsdp": 4, "tensor": 2}, marks=slow),
        pytest.param("mixture", {"fsdp": 8}, marks=slow),
    ],
)
def test_devices_change_rounding_only(shape, axes):
    cfg = config(shape, remat="dots")
    params, tokens = inputs(cfg)
    _, expected = jax.jit(value_and_grad(cfg))(params, tokens)
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params))
        _, found = jax.jit(value_and_grad(cfg))(placed, jax.device_put(tokens, batch_sharding(mesh)))
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("adapters", [True, False])
def test_what_is_not_trained_gets_no_gradient(adapters):
    """Not even one that is thrown away: the products of frozen weights' gradients would cost as much as training."""
    cfg = config(lora=LoraConfig(rank=2, base_dtype="float32"))
    model = Model.random(cfg, jax.random.key(0)).training(lambda path: not adapters or "lora" in path)

    def loss(params, tokens):
        of = model.with_params(params)
        hooks = Hooks(written_out=True, all_trained=model.frozen is None)
        return decoder.token_losses(of.graphdef, of.whole(), tokens, hooks=hooks).losses.mean()

    text = jax.jit(jax.grad(loss)).lower(model.params, inputs(config())[1]).as_text()
    assert "dot_general" in text
    of_a_kernel = re.findall(r"dot_general.*-> tensor<(?:32x48|48x32)xf32>", text)
    assert bool(of_a_kernel) == (not adapters)


def test_anything_but_true_and_false_is_refused():
    with pytest.raises(InputError, match="scan_layers='yes'"):
        config(scan_layers="yes")
