"""Adapters against explicitly adapted and merged kernels; their dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dataflex_jax import sharding
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, layout, lora
from dataflex_jax.models.config import REMAT_POLICIES, LoraConfig, ModelConfig
from dataflex_jax.models.layout import LORA_MODULES
from dataflex_jax.models.linear import AdaptedLinear, set_dropout
from dataflex_jax.training.step import dropout_keys

MODEL = ModelConfig(
    architecture="qwen2",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.2,
    dtype="float32",
    remat="none",
)
LORA = LoraConfig(rank=4, alpha=6)


def adapted(**fields):
    return dataclasses.replace(MODEL, lora=dataclasses.replace(LORA, **fields))


_create = jax.jit(decoder.create, static_argnums=0)


def created(cfg, seed=0):
    """(graphdef, params)"""
    return _create(cfg, jax.random.key(seed))


def build(cfg=None):
    """(graphdef, base, adapters) with both factors away from zero, so that each of them matters."""
    graphdef, params = created(cfg or adapted())
    base, adapters = lora.split(params)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.15, x.shape), x.dtype), adapters)
    return graphdef, base, adapters


def random_tokens(rows=4, length=12, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, length + 1)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def token_losses(graphdef, params, tokens, **kwargs):
    return decoder.token_losses(graphdef, params, tokens, **kwargs)[0]


def mean_loss(graphdef, base, adapters, tokens, **kwargs):
    return decoder.token_losses(graphdef, lora.combine(base, adapters), tokens, **kwargs)[0].mean()


def graphdef_of(cfg):
    return jax.eval_shape(functools.partial(decoder.create, cfg), jax.random.key(0))[0]


def assert_close(actual, expected, atol=1e-5, rtol=0):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=rtol), actual, expected)


# What there is.


def test_adapters_lie_beside_the_kernels_and_leave_the_base_as_it_is():
    _, params = created(adapted(), 3)
    base, adapters = lora.split(params)
    jax.tree.map(np.testing.assert_array_equal, base, created(MODEL, 3)[1])
    jax.tree.map(np.testing.assert_array_equal, adapters, lora.init(MODEL, LORA, jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, lora.combine(base, adapters), params)
    assert lora.split(base) == (base, {})
    assert lora.combine(None, base) is base
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)
    }
    assert shapes["layers/attention/q_proj/lora_a"] == (2, 16, 4)
    assert shapes["layers/mlp/down_proj/lora_a"] == (2, 32, 4)
    assert shapes["layers/mlp/down_proj/lora_b"] == (2, 4, 16)
    assert len(shapes) == 2 * len(LORA_MODULES)
    assert sum(np.prod(shape) for shape in shapes.values()) == adapted().num_lora_params()


def test_factors_are_drawn_as_peft_draws_them():
    """Kaiming's uniform with a = sqrt(5) has the bound 1 / sqrt(inputs); B is zero."""
    cfg = dataclasses.replace(MODEL, hidden_size=64, lora=LoraConfig(rank=32))
    adapters = lora.init(cfg, cfg.lora, jax.random.key(0))
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
    graphdef, base, adapters = build(cfg)
    assert set(adapters["layers"]) == {"attention"}
    assert set(adapters["layers"]["attention"]) == {"q_proj", "v_proj"}
    assert jnp.isfinite(token_losses(graphdef, lora.combine(base, adapters), random_tokens())).all()


# What they compute.


def test_fresh_adapters_change_nothing():
    graphdef, base, _ = build()
    tokens = random_tokens()
    fresh = lora.init(MODEL, LORA, jax.random.key(7))
    got = token_losses(graphdef, lora.combine(base, fresh), tokens)
    np.testing.assert_array_equal(got, token_losses(graphdef_of(MODEL), base, tokens))


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"alpha": None}, {"target_modules": ("o_proj", "gate_proj")}]
)
def test_gradients_are_those_of_explicitly_adapted_kernels(fields):
    cfg = adapted(**fields)
    graphdef, base, adapters = build(cfg)
    tokens = random_tokens()
    alpha = fields.get("alpha", 6) or 8
    scale = alpha / (2 if fields.get("use_rslora") else 4)

    def explicit(adapters):
        def add(params, adapters):
            if "lora_a" in adapters:
                delta = jnp.einsum("lir,lro->lio", adapters["lora_a"], adapters["lora_b"])
                return params | {"kernel": params["kernel"] + scale * delta}
            return params | {name: add(params[name], part) for name, part in adapters.items()}

        return decoder.token_losses(graphdef_of(MODEL), add(base, adapters), tokens)[0].mean()

    loss, gradients = jax.jit(jax.value_and_grad(functools.partial(mean_loss, graphdef, base)))(adapters, tokens)
    expected, expected_gradients = jax.jit(jax.value_and_grad(explicit))(adapters)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_close(gradients, expected_gradients, atol=1e-5)
    assert min(float(jnp.abs(gradient).max()) for gradient in jax.tree.leaves(gradients)) > 1e-4


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_merged_model_computes_the_same(use_rslora):
    cfg = adapted(use_rslora=use_rslora)
    graphdef, base, adapters = build(cfg)
    tokens = random_tokens()
    merged = lora.merge(base, adapters, cfg.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got = token_losses(graphdef_of(MODEL), merged, tokens)
    np.testing.assert_allclose(got, token_losses(graphdef, lora.combine(base, adapters), tokens), atol=1e-5)
    assert not np.allclose(got, token_losses(graphdef_of(MODEL), base, tokens), atol=0.1)


def test_merging_rounds_once():
    base = {"q_proj": {"kernel": jnp.ones((1, 2, 2), jnp.bfloat16)}}
    adapters = {"q_proj": {"lora_a": jnp.full((1, 2, 1), 0.01), "lora_b": jnp.full((1, 1, 2), 0.01)}}
    config = LoraConfig(rank=1, alpha=1)
    exact = lora.merge(base, adapters, config, "float32")["q_proj"]["kernel"]
    np.testing.assert_allclose(exact, np.full((1, 2, 2), 1.0001), rtol=1e-7)
    assert exact.dtype == jnp.float32
    rounded = lora.merge(base, adapters, config)["q_proj"]["kernel"]
    assert rounded.dtype == jnp.bfloat16
    assert (rounded == 1).all()


def test_per_example_gradients_equal_one_row_at_a_time():
    graphdef, base, adapters = build()
    tokens = random_tokens()
    gradient = jax.grad(lambda adapters, row: mean_loss(graphdef, base, adapters, row[None]))
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(adapters, tokens)
    apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(jax.jit(gradient)(adapters, row) for row in tokens))
    assert_close(together, apart, atol=2e-6)


def test_a_block_transform_sees_the_factors_of_each_layer():
    """So a tap may stand on them as on kernels."""
    graphdef, base, adapters = build()
    tokens = random_tokens()

    def second_layer_off(weights, index):
        query = weights["attention"]["q_proj"]
        assert query["lora_a"].shape == (16, 4)
        query = query | {"lora_b": query["lora_b"] * jnp.where(index == 1, 0, 1)}
        return weights | {"attention": weights["attention"] | {"q_proj": query}}

    got = jax.jit(functools.partial(mean_loss, graphdef, block_transform=second_layer_off))(base, adapters, tokens)
    query = adapters["layers"]["attention"]["q_proj"]
    query["lora_b"] = query["lora_b"].at[1].set(0)
    expected = token_losses(graphdef, lora.combine(base, adapters), tokens).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_bfloat16_compute_stays_near_float32_with_float32_gradients():
    tokens = random_tokens()
    graphdef, base, adapters = build()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    half_graphdef = graphdef_of(dataclasses.replace(adapted(), dtype="bfloat16"))
    expected = jax.jit(jax.grad(functools.partial(mean_loss, graphdef, base)))(adapters, tokens)
    gradients = jax.jit(jax.grad(functools.partial(mean_loss, half_graphdef, half)))(adapters, tokens)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


# Dropout.


def test_dropout_is_a_rows_own_and_off_without_keys():
    graphdef, base, adapters = build(adapted(dropout=0.3))
    params, tokens = lora.combine(base, adapters), random_tokens()
    keys = dropout_keys(jax.random.key(1), jnp.int32(5), 4)

    def losses(tokens, keys):
        return token_losses(graphdef, params, tokens, dropout_keys=keys)

    dropped = losses(tokens, keys)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(losses(tokens[order], keys[order]), dropped[order], atol=1e-5)
    # Neither the length of the row nor being mapped over changes what a token sees.
    np.testing.assert_allclose(losses(tokens[:, :9], keys), dropped[:, :8], atol=1e-5)
    one_by_one = jax.vmap(lambda row, key: losses(row[None], key[None])[0])(tokens, keys)
    np.testing.assert_allclose(one_by_one, dropped, atol=1e-5)
    assert not np.allclose(losses(tokens[:1].repeat(4, 0), keys), losses(tokens[:1], keys[:1]), atol=1e-3)
    assert not np.allclose(losses(tokens, dropout_keys(jax.random.key(1), jnp.int32(6), 4)), dropped, atol=1e-3)

    off = token_losses(graphdef, params, tokens)
    without = graphdef_of(adapted(dropout=0.0))
    np.testing.assert_array_equal(off, token_losses(without, params, tokens))
    np.testing.assert_array_equal(off, token_losses(without, params, tokens, dropout_keys=keys))


def test_dropout_zeroes_its_share_of_the_inputs_and_keeps_their_mean():
    """On layers whose output is the adapters' alone, with factors that pass the input on."""
    cfg = dataclasses.replace(MODEL, lora=LoraConfig(rank=16, alpha=16, dropout=0.25, target_modules=("q_proj",)))

    def layer(index):
        linear = AdaptedLinear(cfg, "q_proj", 16, 16, use_bias=False, rngs=nnx.Rngs(0, lora=0))
        linear.kernel[...] = jnp.zeros((16, 16))
        linear.lora_a[...] = linear.lora_b[...] = jnp.eye(16)
        set_dropout(linear, dropout_keys(jax.random.key(0), jnp.int32(0), 4), index)
        return np.asarray(linear(jnp.ones((4, 500, 16))))

    out = layer(0)
    np.testing.assert_allclose(np.unique(out.round(5)), [0, 1.33333], atol=1e-5)
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert ((out == 0) & (layer(1) == 0)).mean() == pytest.approx(0.0625, abs=0.01)  # layers are independent


@pytest.mark.slow
def test_remat_repeats_the_same_dropout():
    tokens, keys = random_tokens(), dropout_keys(jax.random.key(1), jnp.int32(5), 4)
    gradients = {}
    for remat in REMAT_POLICIES:
        graphdef, base, adapters = build(dataclasses.replace(adapted(dropout=0.3), remat=remat))
        loss = functools.partial(mean_loss, graphdef, base)
        gradients[remat] = jax.jit(jax.grad(loss))(adapters, tokens, dropout_keys=keys)
        assert_close(gradients[remat], gradients["none"], atol=1e-6)
    graphdef, base, adapters = build()
    without = jax.jit(jax.grad(functools.partial(mean_loss, graphdef, base)))(adapters, tokens)
    assert not np.allclose(
        without["layers"]["mlp"]["up_proj"]["lora_a"],
        gradients["none"]["layers"]["mlp"]["up_proj"]["lora_a"],
        atol=1e-4,
    )


def test_remat_keeps_one_array_a_projection_with_adapters_too():
    """Not the adapters' products beside the kernels'."""
    wide = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=128, num_hidden_layers=8, remat="dots")
    tokens = jax.ShapeDtypeStruct((8, 129), jnp.int32)

    def temporary_bytes(cfg, argnum):
        graphdef, params = jax.eval_shape(functools.partial(decoder.create, cfg), jax.random.key(0))
        gradient = jax.jit(jax.grad(functools.partial(mean_loss, graphdef), argnums=argnum))
        base, adapters = lora.split(params)
        return gradient.lower(base, adapters, tokens).compile().memory_analysis().temp_size_in_bytes

    adapted_wide = dataclasses.replace(wide, lora=dataclasses.replace(LORA, rank=2))
    assert temporary_bytes(adapted_wide, 1) < 1.2 * temporary_bytes(wide, 0)


# Training.


def test_a_fingerprint_knows_every_bit_and_place_but_not_the_mesh():
    _, base, _ = build()
    known = lora.fingerprint(base)
    assert len(known) == 16
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    assert lora.fingerprint(jax.device_put(base, layout.param_shardings(mesh, base))) == known
    assert lora.fingerprint(jax.tree.map(np.asarray, base)) == known

    def changed(change):
        query = base["layers"]["attention"]["q_proj"]
        attention = base["layers"]["attention"] | {"q_proj": query | {"kernel": change(query["kernel"])}}
        return lora.fingerprint(base | {"layers": base["layers"] | {"attention": attention}})

    others = [
        changed(lambda kernel: kernel.at[1, 2, 3].set(jnp.nextafter(kernel[1, 2, 3], jnp.inf))),
        changed(lambda kernel: kernel.at[0, 0, jnp.array([0, 1])].set(kernel[0, 0, jnp.array([1, 0])])),
        changed(lambda kernel: kernel.swapaxes(1, 2)),
        changed(lambda kernel: kernel.astype(jnp.bfloat16)),
    ]
    assert len({known, *others}) == 5


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
