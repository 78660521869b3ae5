"""The decoder against transformers (golden files, and torch where it is installed) and against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.models import decoder, moe
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.embed import embed
from dataflex_jax.models.hf.config import from_hf
from tests.models.make_golden import (
    GOLDEN,
    MODELS,
    WITH_GRADIENTS,
    hf_named,
    random_params,
    random_tokens,
    torch_model,
    torch_outputs,
)


def build(name, seed=0, **overrides):
    cfg = from_hf(MODELS[name], **({"dtype": "float32"} | overrides))
    graphdef, shapes = jax.eval_shape(functools.partial(decoder.create, cfg), jax.random.key(0))
    params = random_params(cfg, seed)
    jax.tree.map(lambda array, shape: np.testing.assert_equal(array.shape, shape.shape), params, shapes)
    return cfg, graphdef, params


def hidden_states(graphdef, params, tokens, **kwargs):
    return decoder.hidden_states(graphdef, params, tokens, **kwargs)[0]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, tokens):
    return hidden_states(graphdef, params, tokens) @ decoder.output_weight(params)


def mean_loss(cfg, graphdef, params, tokens):
    """As transformers has it in training: of a mixture of experts with its load-balancing loss."""
    real = jnp.ones(tokens[:, 1:].shape)
    if cfg.family.experts is None:
        return decoder.token_losses(graphdef, params, tokens).losses.mean()
    hooks = Hooks(of_router=moe.router_sums(cfg.num_experts_per_tok, real))
    losses, _, aux, _ = decoder.token_losses(graphdef, params, tokens, hooks=hooks)
    return losses.mean() + cfg.router_aux_loss_coef * moe.balancing_loss(aux["of_router"], real.sum())


def assert_same_trees(actual, expected, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_equals_golden_outputs_of_transformers(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    _, graphdef, params = build(name, int(golden["seed"]))
    tokens = golden["tokens"].astype(np.int32)
    np.testing.assert_allclose(logits_of(graphdef, params, tokens[:, :-1]), golden["logits"], rtol=0, atol=1e-4)
    losses, hidden, aux, _ = jax.jit(functools.partial(decoder.token_losses, graphdef))(params, tokens)
    assert golden["losses"].dtype == np.float64
    np.testing.assert_allclose(losses, golden["losses"], rtol=0, atol=1e-5)
    assert losses.dtype == jnp.float32
    assert hidden.shape == (2, 40, 16)
    assert aux == {}


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_equal_golden_gradients_of_transformers(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    cfg, graphdef, params = build(name, int(golden["seed"]))
    gradients = jax.jit(jax.grad(functools.partial(mean_loss, cfg, graphdef)))(
        params, golden["tokens"].astype(np.int32)
    )
    named = hf_named(gradients)
    assert {f"gradient/{name}" for name in named} == {name for name in golden.files if name.startswith("gradient/")}
    for name, gradient in named.items():
        np.testing.assert_allclose(gradient, golden[f"gradient/{name}"], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers_where_torch_is_installed(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cfg, graphdef, params = build(name, seed=100)
    # A longer row than max_position_embeddings: the rotary embeddings go on.
    tokens = random_tokens(cfg, seed=100, length=90)
    logits, losses, gradients, balancing = torch_outputs(torch_model(MODELS[name], params), tokens)
    np.testing.assert_allclose(logits_of(graphdef, params, tokens[:, :-1]), logits, rtol=0, atol=1e-4)
    ours, grads = jax.jit(jax.value_and_grad(functools.partial(mean_loss, cfg, graphdef)))(params, tokens)
    assert float(ours) == pytest.approx(losses.mean() + (cfg.router_aux_loss_coef or 0) * balancing, abs=1e-5)
    for path, gradient in hf_named(grads).items():
        np.testing.assert_allclose(gradient, gradients[path], rtol=0, atol=1e-5, err_msg=path)


def test_create_draws_as_hugging_face_does():
    cfg = from_hf(MODELS["qwen2_untied"] | {"hidden_size": 64, "head_dim": 16, "initializer_range": 0.03})
    graphdef, params = jax.jit(functools.partial(decoder.create, cfg))(jax.random.key(3))
    eager_graphdef, eager_params = decoder.create(cfg, jax.random.key(3))
    assert graphdef == eager_graphdef
    assert hash(graphdef) == hash(eager_graphdef)
    assert_same_trees(params, eager_params, atol=1e-7)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cfg.num_params()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32
        if name.endswith("scale"):
            assert (leaf == 1).all(), name
        elif name.endswith("bias"):
            assert (leaf == 0).all(), name
        else:
            assert float(leaf.std()) == pytest.approx(0.03, rel=0.06), name
            assert abs(float(leaf.mean())) < 0.003, name
    query = params["layers"]["attention"]["q_proj"]["kernel"]
    assert query.shape == (2, 64, 64)
    assert not np.allclose(query[0], query[1])
    assert not np.allclose(params["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)


@pytest.mark.slow
def test_bfloat16_stays_near_float32_and_gradients_are_float32():
    cfg, graphdef, params = build("qwen2_tied")
    half = build("qwen2_tied", dtype="bfloat16")[1]
    tokens = random_tokens(cfg, seed=2)
    value_and_grad = jax.jit(
        lambda g, p: jax.value_and_grad(lambda q: mean_loss(cfg, g, q, tokens))(p), static_argnums=0
    )
    loss, gradients = value_and_grad(graphdef, params)
    half_loss, half_gradients = value_and_grad(half, params)
    assert hidden_states(half, params, tokens).dtype == jnp.bfloat16
    assert half_loss.dtype == jnp.float32
    assert float(half_loss) == pytest.approx(float(loss), rel=0.01)
    for actual, expected in zip(jax.tree.leaves(half_gradients), jax.tree.leaves(gradients), strict=True):
        assert actual.dtype == jnp.float32
        assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


def test_embedding_gradient_of_a_frequent_token_is_not_lost_in_bfloat16():
    """3000 equal terms: a bfloat16 sum stops growing at 256 of them."""
    tokens = jnp.zeros((3, 1000), jnp.int32)

    def summed(table):
        return embed(table, tokens, jnp.dtype("bfloat16")).sum(dtype=jnp.float32)

    gradient = jax.grad(summed)(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, [[3000, 3000], [0, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_packed_segments_equal_separate_rows(name):
    cfg, graphdef, params = build(name)
    tokens = random_tokens(cfg, seed=4)[:1]
    first, second = tokens[:, :15], tokens[:, 15:]
    segments = jnp.repeat(jnp.array([[1, 2]]), np.array([15, 26]), axis=1, total_repeat_length=41)
    packed = hidden_states(graphdef, params, tokens, segment_ids=segments)
    apart = [hidden_states(graphdef, params, part) for part in (first, second)]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), rtol=0, atol=2e-5)
    assert not np.allclose(packed, hidden_states(graphdef, params, tokens), atol=1e-2)


def test_only_differences_of_positions_matter():
    cfg, graphdef, params = build("qwen2_tied")
    tokens = random_tokens(cfg, seed=5)
    shifted = hidden_states(graphdef, params, tokens, positions=jnp.arange(41)[None] + 7)
    np.testing.assert_allclose(shifted, hidden_states(graphdef, params, tokens), rtol=0, atol=5e-5)
    stretched = hidden_states(graphdef, params, tokens, positions=jnp.arange(41)[None] * 2)
    assert not np.allclose(stretched, shifted, atol=1e-2)


def test_block_transform_sees_each_layer_in_the_compute_dtype():
    cfg, graphdef, params = build("qwen3", dtype="bfloat16")
    tokens = random_tokens(cfg, seed=6)
    seen = {}

    def scale_second_layer(weights, index):
        seen.update({name: leaf.dtype for name, leaf in weights["mlp"]["up_proj"].items()})
        seen["norm"] = weights["input_layernorm"]["scale"].dtype
        return jax.tree.map(lambda leaf: leaf * jnp.where(index == 1, 2, 1).astype(leaf.dtype), weights)

    transformed = hidden_states(graphdef, params, tokens, hooks=Hooks(block_transform=scale_second_layer))
    by_hand = jax.tree.map(lambda leaf: leaf * np.float32([1, 2]).reshape(-1, *[1] * (leaf.ndim - 1)), params["layers"])
    expected = hidden_states(graphdef, params | {"layers": by_hand}, tokens)
    np.testing.assert_array_equal(transformed, expected)
    assert seen == {"kernel": jnp.bfloat16, "norm": jnp.float32}


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_moe"])
def test_per_example_gradients_equal_one_row_at_a_time(name):
    cfg, graphdef, params = build(name)
    tokens = random_tokens(cfg, seed=7)
    gradient = jax.grad(lambda p, row: mean_loss(cfg, graphdef, p, row[None]))
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, tokens)
    apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(jax.jit(gradient)(params, row) for row in tokens))
    assert_same_trees(together, apart, atol=2e-6)
