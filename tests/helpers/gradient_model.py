"""A tiny model, batches, and per-example gradients with everything materialised, to compare with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.signals.moments import adam_moments
from dataflex_jax.signals.projections import kronecker_signs, project
from dataflex_jax.signals.rows import named_leaves
from tests.helpers import tiny_model

MODEL = ModelConfig(
    architecture="qwen2",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    dtype="float32",
)
ADAPTED = dataclasses.replace(MODEL, lora=LoraConfig(rank=3, alpha=6))
BETAS = {"b1": 0.9, "b2": 0.95, "eps": 1e-6}


@functools.cache
def build(cfg):
    """The model; both factors of adapters, which alone are trained where there are any, away from zero."""
    model, rng = tiny_model.created(cfg), np.random.default_rng(0)
    if cfg.lora is None:
        return model
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), model.params)
    return model.with_params(adapters)


def batch_of(rows=4, length=12, seed=0):
    """Rows of different lengths, padded on the right; the last has no target."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(length, length // 2, rows).astype(int)
    tokens = rng.integers(1, 64, (rows, length + 1)) * (np.arange(length + 1) <= lengths[:, None])
    mask = (np.arange(length) < lengths[:, None]) & (np.arange(length) >= 2)
    mask[-1] = False
    tokens, lengths = (jnp.asarray(x, jnp.int32) for x in (tokens, lengths))
    return tiny_model.batch_of(tokens, mask=jnp.asarray(mask, jnp.float32), lengths=lengths)


def random_moments(params, **options):
    """Moments as after a hundred steps, in the state of a chain with other counts in it."""
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1))).init(params)
    rng = np.random.default_rng(1)
    adam = state[1][0]
    adam = adam._replace(
        count=jnp.int32(100),
        mu=jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), jnp.float32), adam.mu),
        nu=jax.tree.map(lambda x: jnp.asarray(rng.exponential(1e-3, x.shape), jnp.float32), adam.nu),
    )
    return adam_moments((state[0], (adam, *state[1][1:])), **(BETAS | options))


@jax.jit
def materialised(model, batch):
    """Every trained parameter's per-example gradients [B, ...], by path."""

    def loss(params, row):
        losses = model.with_params(params).token_losses(jax.tree.map(lambda x: x[None], row)).losses[0]
        return (row.mask * losses).sum() / jnp.maximum(row.mask.sum(), 1)

    return named_leaves(jax.vmap(jax.grad(loss), in_axes=(None, 0))(model.params, batch))


def adam_by_hand(gradient, moments, path):
    """float64"""
    mu, nu = (np.asarray(named_leaves(tree)[path], np.float64) for tree in (moments.mu, moments.nu))
    mu = moments.b1 * mu + (1 - moments.b1) * gradient
    nu = moments.b2 * nu + (1 - moments.b2) * gradient**2
    if moments.bias_correction:
        steps = int(moments.count) + 1
        mu, nu = mu / (1 - moments.b1**steps), nu / (1 - moments.b2**steps)
    return mu / np.sqrt(nu + moments.eps) if moments.eps_mode == "inside" else mu / (np.sqrt(nu) + moments.eps)


def map_matrix(projection, path, layer, shape):
    """The explicit map of one parameter and layer, float64 [dim, numbers]."""
    if projection.method == "kronecker":
        p_in, p_out = (np.asarray(p, np.float64) for p in kronecker_signs(projection, path, layer, *shape))
        dense = np.einsum("ik,ol->klio", p_in, p_out) / np.sqrt(p_in.shape[1] * p_out.shape[1])
        dense = dense.reshape(-1, np.prod(shape))
        return np.pad(dense, ((0, projection.dim - len(dense)), (0, 0)))
    return _images_of_basis(projection, path, tuple(shape))[layer].astype(np.float64).T


@functools.cache
def _images_of_basis(projection, path, shape):
    """[layers, numbers, dim]; the basis in one call for all layers, as it is compiled for each path."""
    numbers = int(np.prod(shape))
    basis = jnp.eye(numbers).reshape(numbers, *shape)

    def of_layer(layer):
        return jax.vmap(functools.partial(project, projection, path, layer))(basis)

    return np.asarray(jax.jit(jax.vmap(of_layer))(jnp.arange(MODEL.num_hidden_layers)))


def expected_features(projection, gradients, moments=None):
    """The definition, on `materialised` gradients, in float64."""
    total = 0
    for path, of_path in gradients.items():
        gradient = np.asarray(of_path, np.float64)
        if moments is not None:
            gradient = adam_by_hand(gradient, moments, path)
        layers = range(gradient.shape[1]) if path.startswith("layers/") else [None]
        for layer in layers:
            part = gradient if layer is None else gradient[:, layer]
            total = total + part.reshape(len(part), -1) @ map_matrix(projection, path, layer or 0, part.shape[1:]).T
    return total


def assert_same(actual, expected, tolerance=1e-5):
    """Equal relative to the largest norm of a row."""
    expected = np.asarray(expected, np.float64)
    scale = np.linalg.norm(expected.reshape(len(expected), -1), axis=1).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * scale)
