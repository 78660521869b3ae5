"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864), float32, in Hugging Face's layout."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dataflex_jax.models.config import ModelConfig


def inverse_frequencies(cfg: ModelConfig) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of head channels, float32, with Llama 3's scaling where it is configured."""
    # float32 at every step, as in the runs that trained these weights: at position 1e5 the last bit is 0.01 radians.
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    freqs = np.float32(1.0) / np.power(np.float32(cfg.rope_theta), exponents, dtype=np.float32)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freqs
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / freqs
    smooth = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * freqs / scaling.factor + smooth * freqs).astype(np.float32)


def rope_tables(
    cfg: ModelConfig, positions_BxT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """(cos, sin) of every position's angles, float32."""
    angles = positions_BxT[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates channel i of each head with channel i + H/2; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
