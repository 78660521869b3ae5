"""The MLP of a block."""

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
        gate, up = (checkpoint_name(layer(x), "projected") for layer in (self.gate_proj, self.up_proj))
        gated = constrain(nnx.silu(gate) * up, BATCH_AXES, None, "tensor")
        return checkpoint_name(self.down_proj(gated), "projected")
