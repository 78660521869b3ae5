"""The MLP of a block, whose nonlinearity has a backward pass of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.linear import kernel_options, linear
from dataflex_jax.sharding import BATCH_AXES, constrain


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        cfg: of the model.
        rngs: of the weights.
        width: of a shared expert, whose layers have no adapters; None: the block's own MLP.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, width: int | None = None):
        def layer(name: str, inputs: int | None, outputs: int | None) -> nnx.Linear:
            if width is None:
                return linear(cfg, name, rngs)
            widths = (inputs or width, outputs or width)
            return nnx.Linear(*widths, use_bias=False, **kernel_options(cfg), rngs=rngs)

        self.gate_proj = layer("gate_proj", cfg.hidden_size, None)
        self.up_proj = layer("up_proj", cfg.hidden_size, None)
        self.down_proj = layer("down_proj", None, cfg.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies it."""
        # Where the backward pass redoes these, XLA's GPU compiler makes the three arrays that it needs of them in three
        # passes over both, unless the barrier hides that products gave them: then in one.
        gate, up = jax.lax.optimization_barrier((self.gate_proj(x), self.up_proj(x)))
        gate, up = checkpoint_name(gate, "projected"), checkpoint_name(up, "projected")
        gated = constrain(swiglu(gate, up), BATCH_AXES, None, "tensor")
        return self.down_proj(gated)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*n"], up: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """silu(gate) * up; computed in float32, returned in their dtype."""
    return _swiglu_fwd(gate, up)[0]


def _swiglu_fwd(gate, up):
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * up.astype(jnp.float32)).astype(gate.dtype), (gate, up)


def _swiglu_bwd(residuals, gradient):
    gate, up = residuals
    wide, gradient = gate.astype(jnp.float32), gradient.astype(jnp.float32)
    share = jax.nn.sigmoid(wide)
    d_gate = gradient * up.astype(jnp.float32) * share * (1 + wide * (1 - share))
    return d_gate.astype(gate.dtype), (gradient * wide * share).astype(up.dtype)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
