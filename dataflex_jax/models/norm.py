"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), in float32, with a backward pass of its own.

JAX's derivative would keep or write several float32 arrays as large as the input. This one needs the input as it came
and one number a vector.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.sharding import program_device


class RMSNorm(nnx.Module):
    """Normalises vectors of `width` numbers to a mean square of 1, times a trained scale."""

    def __init__(self, cfg: ModelConfig, width: int, rngs: nnx.Rngs):
        rngs.params()  # draws nothing, but what is drawn after it depends on the stream
        self.scale = nnx.Param(jnp.ones(width, jnp.dtype(cfg.param_dtype)))
        self.epsilon = cfg.rms_norm_eps
        self.dtype = jnp.dtype(cfg.dtype)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Applies it; in the compute dtype."""
        return rms_norm(x.astype(self.dtype), self.scale[...], self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... width"], scale: Float[Array, " width"], epsilon: float) -> Float[Array, "... width"]:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis; computed in float32, returned in x's dtype."""
    return _forward(x, scale, epsilon)[0]


def _forward(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale)


def _backward(epsilon, residuals, gradient):
    x, scale = residuals
    if program_device().platform != "cpu":
        # Where the forward pass is redone just before, XLA would share the mean of squares with it; apart, its GPU
        # compiler makes one kernel of the norm that is redone.
        x = jax.lax.optimization_barrier(x)
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    scaled = gradient * scale.astype(jnp.float32)
    # Both means in one pass over x: to keep the first would be one more that the forward pass has to write.
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    along = jnp.mean(scaled * wide, axis=-1, keepdims=True)
    d_scale = jnp.sum(gradient * (wide * inverse), axis=range(x.ndim - 1))
    return (inverse * scaled - wide * (inverse**3 * along)).astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)
