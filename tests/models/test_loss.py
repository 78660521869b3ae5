"""The tiled cross-entropy against a float64 NumPy reference, and the memory that it does not use."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.models import loss
from dataflex_jax.models.loss import cross_entropy, label_scores, weighted_cross_entropy
from dataflex_jax.sharding import make_mesh
from tests.test_sharding import MESHES

B, T, D, V = 3, 13, 8, 29


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    weight = rng.standard_normal((D, V)).astype(np.float32)
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    example_weights = rng.uniform(-1, 2, (B, T)).astype(np.float32)
    return hidden, weight, labels, example_weights


def reference(hidden, weight, labels, upstream):
    """(losses, d hidden, d weight) of sum(losses * upstream) in float64."""
    hidden, weight, upstream = (np.asarray(x, np.float64) for x in (hidden, weight, upstream))
    logits = hidden @ weight
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    one_hot = np.eye(V)[labels]
    d_logits = (probabilities - one_hot) * upstream[..., None]
    losses = np.log(np.exp(logits).sum(-1)) - (logits * one_hot).sum(-1)
    return losses, d_logits @ weight.T, np.einsum("btd,btv->dv", hidden, d_logits)


# 1: a tile narrower than one position of every row; 12: T is no multiple of the tile; 1000: one tile.
@pytest.mark.parametrize("tile_tokens", [1, 12, 1000])
def test_values_and_gradients_equal_float64(tile_tokens):
    hidden, weight, labels, upstream = make_inputs()
    losses, d_hidden, d_weight = reference(hidden, weight, labels, upstream)

    def objective(hidden, weight):
        losses = cross_entropy(hidden, weight, labels, tile_tokens=tile_tokens)
        return (losses * upstream).sum(), losses

    (_, actual), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(hidden, weight)
    np.testing.assert_allclose(actual, losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients[0], d_hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients[1], d_weight, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, weight, labels, upstream = make_inputs()
    losses = cross_entropy(hidden * 100, weight * 100, labels)
    expected, _, _ = reference(hidden.astype(np.float64) * 100, weight.astype(np.float64) * 100, labels, upstream)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-2)


def test_per_example_gradients():
    hidden, weight, labels, upstream = make_inputs()

    def objective(hidden, weight, labels, upstream):
        return (cross_entropy(hidden[None], weight, labels[None], tile_tokens=4)[0] * upstream).sum()

    gradient = jax.vmap(jax.grad(objective, argnums=(0, 1)), in_axes=(0, None, 0, 0))
    d_hidden, d_weight = jax.jit(gradient)(hidden, weight, labels, upstream)
    for i in range(B):
        _, one_hidden, one_weight = reference(hidden[i : i + 1], weight, labels[i : i + 1], upstream[i : i + 1])
        np.testing.assert_allclose(d_hidden[i], one_hidden[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(d_weight[i], one_weight, rtol=0, atol=1e-5)


def test_bfloat16_matmuls_accumulate_the_weight_gradient_in_float32():
    """Many tiles whose gradients are all alike: a bfloat16 sum over 512 of them would stop at 256 times the first."""
    hidden = jnp.ones((1, 512, 4), jnp.bfloat16)
    labels = jnp.zeros((1, 512), jnp.int32)
    gradient = jax.grad(lambda w: cross_entropy(hidden, w, labels, tile_tokens=1).sum())(jnp.zeros((4, 8)))
    expected = 512 * (1 / 8 - np.eye(8)[0])
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.broadcast_to(expected, (4, 8)))


def test_losses_are_float32_and_hidden_gradient_keeps_its_dtype():
    hidden, weight, labels, _ = make_inputs()
    half = jnp.asarray(hidden, jnp.bfloat16)
    losses, vjp = jax.vjp(lambda h: cross_entropy(h, weight, labels), half)
    assert losses.dtype == jnp.float32
    assert vjp(jnp.ones_like(losses))[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(losses, cross_entropy(jnp.asarray(hidden), weight, labels), rtol=0.05, atol=0.05)


def test_memory_is_far_below_materialised_logits():
    batch, seq_len, width, vocab = 4, 512, 16, 4096
    hidden = jax.ShapeDtypeStruct((batch, seq_len, width), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((width, vocab), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)

    def materialised(hidden, weight, labels):
        logits = jnp.einsum("btd,dv->btv", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).sum()

    def tiled(hidden, weight, labels):
        return cross_entropy(hidden, weight, labels, tile_tokens=128).sum()

    used = {}
    for function in (materialised, tiled):
        compiled = jax.jit(jax.grad(function, argnums=(0, 1))).lower(hidden, weight, labels).compile()
        used[function] = compiled.memory_analysis().temp_size_in_bytes
    logits_bytes = batch * seq_len * vocab * 4
    assert used[materialised] > logits_bytes
    assert used[tiled] < logits_bytes / 5


@pytest.mark.parametrize("mesh_name", [None, "all"])
@pytest.mark.parametrize("tile_tokens", [12, 1000])
def test_with_a_frozen_weight_the_hidden_gradient_is_the_same_and_the_weights_is_zero(tile_tokens, mesh_name):
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(4, 13, 8)).astype(np.float32), rng.normal(size=(8, 32)).astype(np.float32)
    labels, upstream = rng.integers(0, 32, (4, 13)), rng.uniform(-1, 2, (4, 13)).astype(np.float32)

    def objective(hidden, weight, frozen):
        losses = cross_entropy(hidden, weight, labels, tile_tokens=tile_tokens, frozen_weight=frozen)
        return (losses * upstream).sum(), losses

    differentiate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, expected), (d_hidden, _) = differentiate(hidden, weight, False)
    with jax.set_mesh(make_mesh(MESHES[mesh_name] if mesh_name else {"data": 8})):
        (_, losses), (actual, d_weight) = differentiate(hidden, weight, True)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual, d_hidden, rtol=0, atol=1e-5)
    assert not np.any(d_weight)


@pytest.mark.parametrize("mesh_name", [None, *MESHES])
@pytest.mark.parametrize("tile_tokens", [12, 1000])
def test_the_weighted_sum_and_its_gradients_equal_float64(tile_tokens, mesh_name):
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(8, 13, 8)).astype(np.float32), rng.normal(size=(8, V)).astype(np.float32)
    labels, weights = rng.integers(0, V, (8, 13)), rng.uniform(-1, 2, (8, 13)).astype(np.float32)
    losses, d_hidden, d_weight = reference(hidden, weight, labels, weights)

    def objective(hidden, weight):
        total, losses = weighted_cross_entropy(hidden, weight, labels, weights, tile_tokens=tile_tokens)
        # What the sum is multiplied by reaches the gradients; what becomes of the losses does not.
        return 1.7 * total + losses.sum(), (total, losses)

    differentiate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    with jax.set_mesh(make_mesh(MESHES[mesh_name] if mesh_name else {"data": 8})):
        (_, found), gradients = differentiate(hidden, weight)
    np.testing.assert_allclose(found[0], (losses * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(found[1], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients[0], 1.7 * d_hidden, rtol=0, atol=2e-5)
    np.testing.assert_allclose(gradients[1], 1.7 * d_weight, rtol=0, atol=2e-5)
    without = jax.jit(lambda *v: weighted_cross_entropy(*v, labels, weights, tile_tokens=tile_tokens))(hidden, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), without, found)


def test_the_weighted_sums_gradient_of_the_weight_is_accumulated_in_float32():
    hidden, labels = jnp.ones((1, 512, 4), jnp.bfloat16), jnp.zeros((1, 512), jnp.int32)

    def total(weight):
        return weighted_cross_entropy(hidden, weight, labels, jnp.ones((1, 512)), tile_tokens=1)[0]

    gradient = jax.grad(total)(jnp.zeros((4, 8)))
    np.testing.assert_array_equal(gradient, np.broadcast_to(512 * (1 / 8 - np.eye(8)[0]), (4, 8)))


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("mesh_name", [None, "all"])
def test_in_one_pass_over_the_logits_losses_are_the_same(scale, mesh_name, monkeypatch):
    """As on a GPU: the highest logit, the sum and the label's logit from one reduction."""
    monkeypatch.setattr(loss, "program_device", lambda: types.SimpleNamespace(platform="gpu"))
    rng = np.random.default_rng(0)
    hidden, weight = scale * rng.normal(size=(8, 5, 8)), scale * rng.normal(size=(8, 32))
    labels = rng.integers(0, 32, (8, 5))
    logits = hidden @ weight
    highest = logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    expected = logsumexp - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    single = jnp.asarray(hidden, jnp.float32), jnp.asarray(weight, jnp.float32)
    with jax.set_mesh(make_mesh(MESHES[mesh_name] if mesh_name else {"data": 8})):
        losses, greedy = jax.jit(label_scores)(*single, labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5 * scale**2)
    np.testing.assert_array_equal(greedy, logits.argmax(-1) == labels)
