"""A model as a value: its two parts, what it computes with them, and that it goes through JAX as a pytree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.models import decoder, parts
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model
from tests.helpers.tiny_model import (
    LORA,
    MODEL,
    adapted,
    assert_close,
    batch_of,
    build,
    created,
    mean_loss,
    random_tokens,
    token_losses,
    value_and_gradient,
)

UNTIED = dataclasses.replace(MODEL, tie_word_embeddings=False)
PACKED = {
    "segment_ids": jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], jnp.int32),
    "positions": jnp.asarray([[*range(5), *range(7)], [*range(9), 0, 0, 0]], jnp.int32),
}


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def is_norm(path):
    return path.endswith("scale")


# The two parts.


def test_shape_and_random_are_of_the_same_model():
    shape, model = Model.shape(MODEL), Model.random(MODEL, jax.random.key(3))
    assert (shape.params, shape.frozen, model.frozen) == (None, None, None)
    assert shape.having(model.params) == model
    graphdef, params = decoder.create(MODEL, jax.random.key(3))
    assert model.graphdef == graphdef
    assert_equal(model.params, params)


def test_whole_is_all_parameters_whatever_is_trained():
    model = created(UNTIED)
    assert model.whole() is model.params
    norms = model.training(is_norm)
    assert set(parts.paths(norms.params)) == {path for path in parts.paths(model.params) if is_norm(path)}
    assert not set(parts.paths(norms.frozen)) & set(parts.paths(norms.params))
    assert_equal(norms.whole(), model.params)
    head = norms.training(parts.trained_paths(model.params, ("lm_head/*",)))
    assert parts.paths(head.params) == ["lm_head/kernel"]
    assert_equal(head.whole(), model.params)
    everything = head.training(lambda path: True)
    assert everything.frozen is None
    assert_equal(everything.params, model.params)


def test_having_replaces_both_parts():
    model = build()
    assert model.having(model.params).frozen is None
    other = model.having(model.frozen, model.params)
    assert (other.params, other.frozen) == (model.frozen, model.params)
    assert (other.config, other.graphdef) == (model.config, model.graphdef)


# What it computes.


@pytest.mark.parametrize("fields", [{}, PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("trains", ["norms", "adapters"])
def test_losses_and_hidden_states_are_the_decoders(trains, fields):
    model, tokens = build() if trains == "adapters" else created(UNTIED).training(is_norm), random_tokens(rows=2)
    inputs, whole = batch_of(tokens, **fields), parts.combined(model.frozen, model.params)

    def of_decoder(hooks):
        return decoder.token_losses(model.graphdef, whole, tokens, **fields, hooks=hooks)

    decoded, expected = model.token_losses(inputs), of_decoder(decoder.NO_HOOKS)
    assert_equal(decoded, expected)
    assert decoded.losses.shape == (2, 12)
    assert_equal(model.hidden_states(inputs), expected.hidden)

    def halved(weights, index):
        return jax.tree.map(lambda weight: weight / 2, weights)

    hooks = Hooks(block_transform=halved)
    assert_equal(model.token_losses(inputs, hooks), of_decoder(hooks))
    assert_equal(model.hidden_states(inputs, hooks), of_decoder(hooks).hidden)
    assert not np.allclose(model.token_losses(inputs, hooks).losses, expected.losses, atol=1e-3)


def test_packed_rows_are_read_apart():
    model, tokens = build(), random_tokens(rows=2)
    packed = model.token_losses(batch_of(tokens, **PACKED)).losses
    alone = model.token_losses(batch_of(tokens[:1, 5:])).losses
    np.testing.assert_allclose(packed[0, 5:], alone[0], atol=1e-5)
    assert not np.allclose(token_losses(model, tokens)[0, 5:], alone[0], atol=1e-2)


@pytest.mark.parametrize("trained", [parts.is_adapter, lambda path: parts.is_adapter(path) or is_norm(path)])
def test_without_adapters_the_losses_are_the_same(trained):
    model, tokens = build().training(trained), random_tokens()
    plain = model.without_adapters()
    assert plain.config == MODEL
    assert plain.frozen is None
    assert jax.tree.structure(plain) == jax.tree.structure(created(MODEL))
    np.testing.assert_allclose(token_losses(plain, tokens), token_losses(model, tokens), atol=1e-5)
    unchanged = created(MODEL)
    assert not np.allclose(token_losses(plain, tokens), token_losses(unchanged, tokens), atol=0.1)
    assert unchanged.without_adapters() is unchanged


def test_only_merged_kernels_take_the_dtype():
    model = build(adapted(target_modules=("q_proj",)))
    dtypes = {path: leaf.dtype for path, leaf in parts.leaves(model.without_adapters("bfloat16").params)}
    assert [path for path, dtype in dtypes.items() if dtype == jnp.bfloat16] == ["layers/attention/q_proj/kernel"]
    assert set(dtypes.values()) == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    half = model.having(model.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.frozen))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.without_adapters().params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("cfg", "lora", "patterns", "frozen"),
    [
        (MODEL, None, None, False),
        (MODEL, LORA, None, True),
        (MODEL, None, ("*/scale",), True),
        (MODEL, None, ("embed_tokens/*",), False),
        (MODEL, LORA, ("embed_tokens/*",), False),
        (UNTIED, None, None, False),
        (UNTIED, LORA, None, True),
        (UNTIED, None, ("*/scale", "embed_tokens/*"), True),
        (UNTIED, None, ("lm_head/*",), False),
        (UNTIED, LORA, ("lm_head/*", "norm/scale"), False),
    ],
)
def test_head_is_frozen_where_its_weight_is_not_trained(cfg, lora, patterns, frozen):
    """With tied embeddings its weight is the embeddings'."""
    cfg = dataclasses.replace(cfg, lora=lora)
    model = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0))
    trained = parts.trained_paths(model.params, patterns)
    model = model if trained is None else model.training(trained)
    assert model.head_is_frozen == frozen


def test_a_frozen_head_changes_no_gradient():
    model, tokens = build(), random_tokens()

    assert model.head_is_frozen
    gradient = jax.jit(value_and_gradient, static_argnames="frozen_head")
    assert_close(gradient(model, tokens, frozen_head=True), gradient(model, tokens, frozen_head=False), atol=1e-7)


# As a pytree.


def test_the_leaves_are_the_parameters_and_the_rest_is_hashable():
    model = build()
    leaves, structure = jax.tree.flatten(model)
    assert len(leaves) == len(jax.tree.leaves(model.params)) + len(jax.tree.leaves(model.frozen))
    assert jax.tree.unflatten(structure, leaves) == model
    assert hash(Model.shape(MODEL)) == hash(Model.shape(MODEL))
    assert Model.shape(MODEL) == Model.shape(MODEL) != Model.shape(UNTIED)
    # Another model of the same shape is not traced again; one of another shape is.
    other = jax.tree.structure(build(adapted()))
    assert (structure == other, hash(structure) == hash(other)) == (True, True)
    assert structure != jax.tree.structure(build(adapted(alpha=7)))


def test_it_is_compiled_once_a_shape():
    traces = []

    @jax.jit
    def losses(model, tokens):
        traces.append(model.config)
        return model.token_losses(batch_of(tokens)).losses

    for cfg in (adapted(), adapted(), adapted(alpha=7)):
        model = build(cfg)
        np.testing.assert_allclose(losses(model, random_tokens()), token_losses(model, random_tokens()), atol=1e-6)
    assert traces == [adapted(), adapted(alpha=7)]


def test_a_gradient_is_a_model_too():
    model, tokens = build(), random_tokens()
    gradient = jax.jit(jax.grad(mean_loss))(model, tokens)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    assert_close(gradient.params, jax.jit(value_and_gradient)(model, tokens)[1], atol=1e-6)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0
