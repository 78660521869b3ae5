"""Adapters against explicitly adapted and merged kernels; their dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dataflex_jax import sharding
from dataflex_jax.errors import InputError
from dataflex_jax.models import layout, lora, parts
from dataflex_jax.models.config import REMAT_POLICIES, LoraConfig
from dataflex_jax.models.layout import LORA_MODULES
from dataflex_jax.models.linear import AdaptedLinear, kernel_options, set_dropout
from dataflex_jax.models.model import Model
from tests.helpers.tiny_model import (
    LORA,
    MODEL,
    adapted,
    assert_close,
    build,
    created,
    mean_loss,
    random_tokens,
    token_losses,
    value_and_gradient,
)


def base_of(model):
    """The model of the frozen parameters alone."""
    return Model.shape(MODEL).having(model.frozen)


# What there is.


def test_adapters_lie_beside_the_kernels_and_leave_the_base_as_it_is():
    model = created(adapted(), 3)
    jax.tree.map(np.testing.assert_array_equal, model.frozen, created(MODEL, 3).params)
    shapes = {path: leaf.shape for path, leaf in parts.leaves(model.params)}
    assert shapes["layers/attention/q_proj/lora_a"] == (2, 16, 4)
    assert shapes["layers/mlp/down_proj/lora_a"] == (2, 32, 4)
    assert shapes["layers/mlp/down_proj/lora_b"] == (2, 4, 16)
    assert len(shapes) == 2 * len(LORA_MODULES)
    assert sum(np.prod(shape) for shape in shapes.values()) == adapted().num_lora_params()


def test_factors_are_drawn_as_peft_draws_them():
    """Kaiming's uniform with a = sqrt(5) has the bound 1 / sqrt(inputs); B is zero."""
    adapters = created(dataclasses.replace(MODEL, hidden_size=64, lora=LoraConfig(rank=32))).params
    query, down = adapters["layers"]["attention"]["q_proj"], adapters["layers"]["mlp"]["down_proj"]
    for factors, inputs in ((query, 64), (down, 32)):
        bound = inputs**-0.5
        assert np.abs(factors["lora_a"]).max() == pytest.approx(bound, rel=0.01)
        assert factors["lora_a"].std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not factors["lora_b"].any()
    assert not np.allclose(query["lora_a"][0], query["lora_a"][1])
    assert not np.allclose(query["lora_a"], adapters["layers"]["attention"]["k_proj"]["lora_a"])


def test_only_the_modules_that_are_named_have_adapters():
    cfg = adapted(target_modules=("v_proj", "q_proj"))
    assert cfg.lora.target_modules == ("q_proj", "v_proj")
    model = build(cfg)
    assert set(model.params["layers"]) == {"attention"}
    assert set(model.params["layers"]["attention"]) == {"q_proj", "v_proj"}
    assert jnp.isfinite(token_losses(model, random_tokens())).all()


def test_adapters_are_split_with_their_channels_and_whole_on_fsdp():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = layout.param_shardings(mesh, created(adapted()).params)
    for module in LORA_MODULES:
        factors = shardings["layers"]["attention" if module in LORA_MODULES[:4] else "mlp"][module]
        along_inputs = module in ("o_proj", "down_proj")
        assert factors["lora_a"].spec == P(None, "tensor" if along_inputs else None, None)
        assert factors["lora_b"].spec == P(None, None, None if along_inputs else "tensor")


# What they compute.


def test_fresh_adapters_change_nothing():
    model, tokens = created(adapted(), 7), random_tokens()
    np.testing.assert_array_equal(token_losses(model, tokens), token_losses(base_of(model), tokens))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"use_rslora": True},
        pytest.param({"alpha": None}, marks=pytest.mark.slow),
        {"target_modules": ("o_proj", "gate_proj")},
    ],
)
def test_gradients_are_those_of_explicitly_adapted_kernels(fields):
    model, tokens = build(adapted(**fields)), random_tokens()
    alpha = fields.get("alpha", 6) or 8
    scale = alpha / (2 if fields.get("use_rslora") else 4)

    def explicit(adapters):
        def add(params, adapters):
            if "lora_a" in adapters:
                delta = jnp.einsum("lir,lro->lio", adapters["lora_a"], adapters["lora_b"])
                return params | {"kernel": params["kernel"] + scale * delta}
            return params | {name: add(params[name], part) for name, part in adapters.items()}

        return mean_loss(Model.shape(MODEL).having(add(model.frozen, adapters)), tokens)

    loss, gradients = jax.jit(value_and_gradient)(model, tokens)
    expected, expected_gradients = jax.jit(jax.value_and_grad(explicit))(model.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_close(gradients, expected_gradients, atol=1e-5)
    assert min(float(jnp.abs(gradient).max()) for gradient in jax.tree.leaves(gradients)) > 1e-4


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_merged_model_computes_the_same(use_rslora):
    model, tokens = build(adapted(use_rslora=use_rslora)), random_tokens()
    merged = lora.merge(model.whole(), model.config.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(model.frozen)
    got = token_losses(Model.shape(MODEL).having(merged), tokens)
    np.testing.assert_allclose(got, token_losses(model, tokens), atol=1e-5)
    assert not np.allclose(got, token_losses(base_of(model), tokens), atol=0.1)


def test_merging_rounds_once():
    factors = {"lora_a": jnp.full((1, 2, 1), 0.01), "lora_b": jnp.full((1, 1, 2), 0.01)}
    params = {"q_proj": {"kernel": jnp.ones((1, 2, 2), jnp.bfloat16), "bias": jnp.ones((1, 2)), **factors}}
    config = LoraConfig(rank=1, alpha=1)
    exact = lora.merge(params, config, "float32")["q_proj"]
    np.testing.assert_allclose(exact["kernel"], np.full((1, 2, 2), 1.0001), rtol=1e-7)
    assert exact["kernel"].dtype == jnp.float32
    assert exact["bias"] is params["q_proj"]["bias"]
    rounded = lora.merge(params, config)["q_proj"]["kernel"]
    assert rounded.dtype == jnp.bfloat16
    assert (rounded == 1).all()


def test_per_example_gradients_equal_one_row_at_a_time():
    model, tokens = build(), random_tokens()

    def gradient(row):
        return value_and_gradient(model, row[None])[1]

    apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jax.jit(gradient), tokens))
    assert_close(jax.jit(jax.vmap(gradient))(tokens), apart, atol=2e-6)


def test_a_block_transform_sees_the_factors_of_each_layer():
    """So a tap may stand on them as on kernels."""
    model, tokens = build(), random_tokens()

    def second_layer_off(weights, index):
        query = weights["attention"]["q_proj"]
        assert query["lora_a"].shape == (16, 4)
        query = query | {"lora_b": query["lora_b"] * jnp.where(index == 1, 0, 1)}
        return weights | {"attention": weights["attention"] | {"q_proj": query}}

    got = jax.jit(functools.partial(mean_loss, block_transform=second_layer_off))(model, tokens)
    query = model.params["layers"]["attention"]["q_proj"]
    query["lora_b"] = query["lora_b"].at[1].set(0)
    np.testing.assert_allclose(got, token_losses(model, tokens).mean(), rtol=1e-6)


def test_bfloat16_compute_stays_near_float32_with_float32_gradients():
    model, tokens = build(), random_tokens()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.frozen)
    half = Model.shape(dataclasses.replace(adapted(), dtype="bfloat16")).having(model.params, half)
    _, expected = jax.jit(value_and_gradient)(model, tokens)
    _, gradients = jax.jit(value_and_gradient)(half, tokens)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


# Dropout.


def row_keys(seed, rows=4):
    return jax.random.split(jax.random.key(seed), rows)


def test_dropout_is_a_rows_own_and_off_without_keys():
    model, tokens, keys = build(adapted(dropout=0.3)), random_tokens(), row_keys(5)

    def losses(tokens, keys):
        return token_losses(model, tokens, dropout_keys=keys)

    dropped = losses(tokens, keys)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(losses(tokens[order], keys[order]), dropped[order], atol=1e-5)
    # Neither the length of the row nor being mapped over changes what a token sees.
    np.testing.assert_allclose(losses(tokens[:, :9], keys), dropped[:, :8], atol=1e-5)
    one_by_one = jax.vmap(lambda row, key: losses(row[None], key[None])[0])(tokens, keys)
    np.testing.assert_allclose(one_by_one, dropped, atol=1e-5)
    assert not np.allclose(losses(tokens[:1].repeat(4, 0), keys), losses(tokens[:1], keys[:1]), atol=1e-3)
    assert not np.allclose(losses(tokens, row_keys(6)), dropped, atol=1e-3)

    off = token_losses(model, tokens)
    without = Model.shape(adapted(dropout=0.0)).having(model.params, model.frozen)
    np.testing.assert_array_equal(off, token_losses(without, tokens))
    np.testing.assert_array_equal(off, token_losses(without, tokens, dropout_keys=keys))


def test_dropout_zeroes_its_share_of_the_inputs_and_keeps_their_mean():
    """On layers whose output is the adapters' alone, with factors that pass the input on."""
    cfg = dataclasses.replace(MODEL, lora=LoraConfig(rank=16, alpha=16, dropout=0.25, target_modules=("q_proj",)))

    def layer(index):
        linear = AdaptedLinear(cfg, "q_proj", 16, 16, use_bias=False, **kernel_options(cfg), rngs=nnx.Rngs(0, lora=0))
        linear.kernel[...] = jnp.zeros((16, 16))
        linear.lora_a[...] = linear.lora_b[...] = jnp.eye(16)
        set_dropout(linear, row_keys(0), index)
        return np.asarray(linear(jnp.ones((4, 500, 16))))

    out = layer(0)
    np.testing.assert_allclose(np.unique(out.round(5)), [0, 1.33333], atol=1e-5)
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert ((out == 0) & (layer(1) == 0)).mean() == pytest.approx(0.0625, abs=0.01)  # layers are independent


@pytest.mark.slow
def test_remat_repeats_the_same_dropout():
    tokens, keys = random_tokens(), row_keys(5)
    gradients = {}
    for remat in REMAT_POLICIES:
        model = build(dataclasses.replace(adapted(dropout=0.3), remat=remat))
        _, gradients[remat] = jax.jit(value_and_gradient)(model, tokens, dropout_keys=keys)
        assert_close(gradients[remat], gradients["none"], atol=1e-6)
    _, without = jax.jit(value_and_gradient)(build(), tokens)
    assert not np.allclose(
        without["layers"]["mlp"]["up_proj"]["lora_a"],
        gradients["none"]["layers"]["mlp"]["up_proj"]["lora_a"],
        atol=1e-4,
    )


# What they cost.


def compiled_gradient(cfg, trained, tokens):
    """Of the mean loss with respect to the parameters that `trained` accepts; None: to all."""
    model = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0))
    if trained is not None:
        model = model.training(trained)
    return jax.jit(value_and_gradient).lower(model, tokens).compile()


def test_remat_keeps_one_array_a_projection_with_adapters_too():
    """Not the adapters' products beside the kernels'."""
    wide = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=128, num_hidden_layers=8, remat="dots")
    adapted_wide = dataclasses.replace(wide, lora=dataclasses.replace(LORA, rank=2))
    tokens = jax.ShapeDtypeStruct((8, 129), jnp.int32)

    def temporary_bytes(cfg, trained):
        return compiled_gradient(cfg, trained, tokens).memory_analysis().temp_size_in_bytes

    assert temporary_bytes(adapted_wide, parts.is_adapter) < 1.2 * temporary_bytes(wide, None)


def test_frozen_weights_cost_no_gradient():
    """Neither a kernel's nor the embedding's gradient is computed, so a step does less than a full one."""
    cfg = dataclasses.replace(adapted(), vocab_size=2048, hidden_size=64, intermediate_size=256)
    tokens = jax.ShapeDtypeStruct((4, 65), jnp.int32)

    def flops(trained):
        return compiled_gradient(cfg, trained, tokens).cost_analysis()["flops"]

    assert flops(parts.is_adapter) < 0.85 * flops(lambda path: not parts.is_adapter(path))
    assert cfg.flops_per_token(64) < 0.8 * dataclasses.replace(cfg, lora=None).flops_per_token(64)


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ("q_proj", "w_proj")}, r"lora target_modules='w_proj'.*'q_proj', 'k_proj'"),
        ({"target_modules": ()}, r"lora target_modules=\(\)"),
        ({"target_modules": "q_proj"}, r"must be a tuple"),
        ({"rank": 0}, r"lora rank=0"),
        ({"alpha": -1.0}, r"lora alpha=-1.0"),
        ({"dropout": 1.0}, r"lora dropout=1.0"),
        ({"base_dtype": "int8"}, r"lora base_dtype='int8'.*'bfloat16'"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    with pytest.raises(InputError, match=message) as e:
        dataclasses.replace(LORA, **fields)
    assert "\n" not in str(e.value)
