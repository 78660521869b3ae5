"""Linear layers with biases: the gradients of the biases, and several layers of one input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dataflex_jax.models.linear import linear, of_one_input, set_product
from dataflex_jax.sharding import make_mesh
from tests.helpers.tiny_model import MODEL, adapted

NAMES = ("q_proj", "k_proj", "v_proj")
CONFIG = dataclasses.replace(MODEL, num_attention_heads=4, num_key_value_heads=2)
TOKENS = 4096


def layers_of(cfg, biased=NAMES):
    layers = {name: linear(cfg, name, nnx.Rngs(i, lora=i), name in biased) for i, name in enumerate(NAMES)}
    for name in biased:
        layers[name].bias[...] = jnp.asarray(np.random.default_rng(0).normal(size=layers[name].bias.shape), jnp.float32)
    return nnx.split(nnx.Dict(layers))


def inputs(dtype="float32", rows=2, tokens=6):
    rng = np.random.default_rng(1)
    widths = CONFIG.linear_widths()
    x = jnp.asarray(rng.normal(size=(rows, tokens, widths["q_proj"][0])), dtype)
    return x, tuple(jnp.asarray(rng.normal(1, 1, (rows, tokens, widths[name][1])), dtype) for name in NAMES)


def together(graphdef, state, x):
    modules = nnx.merge(graphdef, state)
    return of_one_input(x, [modules[name] for name in NAMES])


def apart(graphdef, state, x):
    modules = nnx.merge(graphdef, state)
    return tuple(modules[name](x) for name in NAMES)


def value_and_gradients(function, graphdef, state, x, upstream):
    values, vjp = jax.vjp(lambda state, x: function(graphdef, state, x), state, x)
    return values, vjp(upstream)


@pytest.mark.parametrize("biased", [NAMES, ("k_proj",), ()])
def test_layers_of_one_input_are_what_each_is_alone(biased):
    graphdef, state = layers_of(CONFIG, biased)
    x, upstream = inputs()
    found = value_and_gradients(together, graphdef, state, x, upstream)
    expected = value_and_gradients(apart, graphdef, state, x, upstream)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), found, expected)
    jaxpr = str(jax.make_jaxpr(lambda *v: value_and_gradients(together, graphdef, *v))(state, x, upstream))
    assert jaxpr.count("dot_general[") == 4  # two forward, the input's gradient and the weights'


@pytest.mark.parametrize("layers", [together, apart])
def test_bias_gradients_of_many_bfloat16_tokens_are_summed_in_float32(layers):
    graphdef, state = layers_of(dataclasses.replace(CONFIG, dtype="bfloat16"))
    x, upstream = inputs("bfloat16", rows=2, tokens=TOKENS)
    _, (gradients, _) = value_and_gradients(layers, graphdef, state, x, upstream)
    for name, gradient in zip(NAMES, upstream, strict=True):
        exact = np.asarray(gradient, np.float64).sum((0, 1))
        found = gradients[name]["bias"][...]
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=1e-5)
        # What JAX would do of a broadcast bias, for the size of the error that is avoided.
        rounded = jax.lax.reduce(gradient, jnp.bfloat16(0), jax.lax.add, (0, 1))
        assert np.abs(np.asarray(rounded, np.float64) / exact - 1).max() > 1e-3


def test_adapters_products_of_a_caller_split_heads_and_single_tokens_keep_layers_apart():
    x, _ = inputs()
    graphdef, state = layers_of(dataclasses.replace(CONFIG, lora=adapted().lora))
    outputs = [fn(graphdef, state, x) for fn in (together, apart)]
    jax.tree.map(np.testing.assert_array_equal, *outputs)

    graphdef, state = layers_of(CONFIG)
    modules, seen = nnx.merge(graphdef, state), []
    set_product(modules, lambda path, layer, x, weight: seen.append(path) or x @ weight, 0)
    of_one_input(x, [modules[name] for name in NAMES])
    assert seen == [f"{name}/kernel" for name in NAMES]

    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        jaxpr = str(jax.make_jaxpr(lambda x: together(graphdef, state, x))(x))
        assert "concatenate" not in jaxpr
    assert "concatenate" not in str(jax.make_jaxpr(lambda x: together(graphdef, state, x))(x[:, :1]))
    assert "concatenate" in str(jax.make_jaxpr(lambda x: together(graphdef, state, x))(x))
