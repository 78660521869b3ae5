"""A tiny decoder, with adapters and without, its inputs and its losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.data.batch import Batch
from dataflex_jax.models import parts
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model

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


def adapted(**fields) -> ModelConfig:
    """The tiny model with adapters."""
    return dataclasses.replace(MODEL, lora=dataclasses.replace(LORA, **fields))


_random = jax.jit(Model.random, static_argnums=0)


def created(cfg: ModelConfig, seed: int = 0) -> Model:
    """As a fresh run has it; adapters, where there are any, are trained alone."""
    model = _random(cfg, jax.random.key(seed))
    return model if cfg.lora is None else model.training(parts.is_adapter)


def build(cfg: ModelConfig | None = None) -> Model:
    """An adapted model with both factors away from zero, so that each of them matters."""
    model = created(cfg or adapted())
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.15, x.shape), x.dtype), model.params)
    return model.with_params(adapters)


def random_tokens(rows: int = 4, length: int = 12, seed: int = 0) -> jax.Array:
    """[rows, length + 1]"""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, length + 1)), jnp.int32)


def batch_of(tokens: jax.Array, **fields) -> Batch:
    """Full rows, of two domains in turn, in which every prediction counts."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    whole = {"mask": jnp.ones((rows, length)), "lengths": jnp.full(rows, length), "domain": jnp.arange(rows) % 2}
    return Batch(tokens, **(whole | fields))


@jax.jit
def token_losses(model: Model, tokens: jax.Array, **hooks) -> jax.Array:
    """[B, T] of rows of tokens; `hooks` are arrays."""
    return model.token_losses(batch_of(tokens), Hooks(**hooks)).losses


def mean_loss(model: Model, tokens: jax.Array, **hooks) -> jax.Array:
    """Over all rows and tokens."""
    return model.token_losses(batch_of(tokens), Hooks(**hooks)).losses.mean()


def value_and_gradient(model: Model, tokens: jax.Array, **hooks) -> tuple[jax.Array, dict]:
    """Of `mean_loss`, with respect to the trained parameters."""
    return jax.value_and_grad(lambda params: mean_loss(model.with_params(params), tokens, **hooks))(model.params)


def assert_close(actual, expected, atol: float = 1e-5, rtol: float = 0) -> None:
    """Every leaf of two trees."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=rtol), actual, expected)
