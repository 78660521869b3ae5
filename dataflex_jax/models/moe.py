"""The mixture of experts: a router sends each token through a few of many SwiGLU experts, and none is dropped.

B rows of T tokens, D channels, E experts of width F, K of them a token. A token's visit to one expert is a slot, so
there are B T K of them. Slots are sorted by expert and computed in blocks of one expert each; only the last block of
each expert is padded. So no array is larger than the slots' inputs, and the products are those of the chosen experts.
`jax.lax.ragged_dot` would do, but off TPUs it is lowered to products of all experts with all slots, and it cannot be
vmapped beside weights that are shared, as per-example gradients are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.linear import kernel_options
from dataflex_jax.models.mlp import MLP
from dataflex_jax.sharding import BATCH_AXES, constrain, divisible_axis, map_rows, program_device, rows_are_split

# Slots of one expert in one product: a share of the experts' average, which bounds the padding, but not fewer than pay
# for reading the expert's weights, where there are as many.
LEAST_SLOTS, MOST_SLOTS, _SHARE = 64, 512, 1 / 12


def _float32_product(
    x: Float[Array, "B T D"], weight: Float[Array, "D E"], *_: Any, **__: Any
) -> Float[Array, "B T E"]:
    return jnp.matmul(x, weight, precision="highest")


class MoE(nnx.Module):
    """Router and experts, in place of a block's `MLP`."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        in_float32 = {"dtype": jnp.dtype("float32"), "dot_general": _float32_product}
        options = kernel_options(cfg)
        self.router = nnx.Linear(cfg.hidden_size, cfg.num_experts, use_bias=False, **(options | in_float32), rngs=rngs)
        self.experts = Experts(cfg, rngs)
        if cfg.family.experts.shared:
            self.shared_expert = MLP(cfg, rngs, width=cfg.shared_expert_intermediate_size)
            self.shared_expert_gate = nnx.Linear(cfg.hidden_size, 1, use_bias=False, **options, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
        """(output, the router's logits in float32)."""
        logits = self.router(x.astype(jnp.float32))
        y = self.experts(x, *route(logits, self.cfg.num_experts_per_tok, self.cfg.norm_topk_prob))
        if self.cfg.family.experts.shared:
            y += nnx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y, logits


class Experts(nnx.Module):
    """The experts' weights, those of all experts in one parameter."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        number, width, hidden = cfg.num_experts, cfg.expert_width, cfg.hidden_size
        draw, dtype = nnx.initializers.normal(cfg.initializer_range), jnp.dtype(cfg.param_dtype)
        self.gate_proj = nnx.Param(draw(rngs.params(), (number, hidden, width), dtype))
        self.up_proj = nnx.Param(draw(rngs.params(), (number, hidden, width), dtype))
        self.down_proj = nnx.Param(draw(rngs.params(), (number, width, hidden), dtype))

    def __call__(
        self, x: Float[Array, "B T D"], probabilities: Float[Array, "B T K"], experts: Int[Array, "B T K"]
    ) -> Float[Array, "B T D"]:
        """The sum over each token's experts of probability times output; `probabilities` and `experts` from `route`."""
        weights = tuple(weight[...].astype(x.dtype) for weight in (self.gate_proj, self.up_proj, self.down_proj))
        if not rows_are_split(x.shape[0]):
            return checkpoint_name(_mixed(x, probabilities, experts, *weights), "projected")
        # Each device sorts the slots of its own rows.
        rows, axis = P(BATCH_AXES), divisible_axis("tensor", weights[0].shape[2])
        specs = (P(None, None, axis), P(None, None, axis), P(None, axis, None))

        def of_device(*operands):
            y = _mixed(*operands)
            return y if axis is None else jax.lax.psum(y, axis)

        x = constrain(x, BATCH_AXES, None, None)
        y = map_rows(of_device, (rows, rows, rows, *specs), rows)(x, probabilities, experts, *weights)
        return checkpoint_name(y, "projected")


def route(
    logits: Float[Array, "B T E"], top_k: int, normalized: bool
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """(probabilities, numbers) of the experts that each token goes to.

    Args:
        logits: of the router, float32.
        top_k: how many experts a token goes to.
        normalized: whether the chosen probabilities are divided by their sum.
    """
    probabilities, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if normalized:
        probabilities /= jnp.sum(probabilities, axis=-1, keepdims=True)
    return probabilities, experts


class RouterSums(NamedTuple):
    """Of a layer's router over tokens.

    Attributes:
        slots: how many of the tokens each expert got.
        probabilities: the sums of each expert's probabilities.
        squares: the sum of the squared logsumexp of the logits.
    """

    slots: Float[Array, "*L E"]
    probabilities: Float[Array, "*L E"]
    squares: Float[Array, "*L"]


def router_sums(top_k: int, real: Float[Array, "B T"]) -> Callable[[Float[Array, "B T E"]], RouterSums]:
    """The function of a router's logits, for `Hooks.of_router`.

    Args:
        top_k: how many experts a token goes to.
        real: 1 where an input is no padding.
    """

    def sums(logits: Float[Array, "B T E"]) -> RouterSums:
        probabilities = jnp.einsum("bt,bte->e", real, jax.nn.softmax(logits, axis=-1), precision="highest")
        squares = jnp.sum(real * jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        return RouterSums(jnp.sum(loads(logits, top_k, real), axis=0), probabilities, squares)

    return sums


def loads(logits: Float[Array, "B T E"], top_k: int, real: Float[Array, "B T"]) -> Float[Array, "B E"]:
    """How many of each row's tokens each expert gets; `real` as in `router_sums`."""
    _, experts = jax.lax.top_k(logits, top_k)
    rows = jnp.arange(logits.shape[0])[:, None, None]
    return jnp.zeros((logits.shape[0], logits.shape[2])).at[rows, experts].add(real[:, :, None])


def balancing_loss(sums: RouterSums, tokens: Float[Array, ""]) -> Float[Array, ""]:
    """E sum_e f_e P_e, with f_e the slots of expert e a token and P_e its mean probability, both over the tokens of all
    layers; about K where all experts get as many (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4).

    Args:
        sums: of all layers.
        tokens: how many there are, in each layer.
    """
    layers, experts = sums.slots.shape
    total = jnp.maximum(layers * tokens, 1.0)
    share, probability = jnp.sum(sums.slots, axis=0) / total, jnp.sum(sums.probabilities, axis=0) / total
    return experts * jnp.sum(share * probability)


def z_loss(sums: RouterSums, tokens: Float[Array, ""]) -> Float[Array, ""]:
    """The mean squared logsumexp of the logits, over the tokens of all layers; arguments as in `balancing_loss`."""
    return jnp.sum(sums.squares) / jnp.maximum(sums.squares.shape[0] * tokens, 1.0)


def _mixed(x, probabilities, experts, gate, up, down):
    """What `Experts` computes, of the rows and channels that are here."""
    rows, tokens, width = x.shape
    top_k = experts.shape[-1]
    slots = rows * tokens * top_k
    layout = _blocks(experts.reshape(slots), gate.shape[0])
    token = jnp.where(layout.real, layout.slot // top_k, 0)
    inputs = jnp.where(layout.real[..., None], x.reshape(-1, width)[token], 0)
    factors = jnp.where(layout.real, probabilities.reshape(slots)[layout.slot], 0.0)
    outputs = _swiglu(inputs, factors, layout.expert, gate, up, down)
    of_slots = outputs.reshape(-1, width)[layout.place].reshape(rows, tokens, top_k, width)
    return jnp.sum(of_slots, axis=2, dtype=jnp.float32).astype(x.dtype)


class _Blocks(NamedTuple):
    """N blocks of S places for slots.

    Attributes:
        expert: of each block; of the ones at the end that are not needed, the last.
        slot: at each place; 0 where there is none.
        real: whether there is one.
        place: of each slot, among all N S.
    """

    expert: Int[Array, " N"]
    slot: Int[Array, "N S"]
    real: Bool[Array, "N S"]
    place: Int[Array, " slots"]


def _blocks(experts: Int[Array, " slots"], number: int) -> _Blocks:
    """Places for slots, of which each goes to one of `number` experts."""
    slots = experts.shape[0]
    average = math.ceil(slots / number)
    size = min(max(LEAST_SLOTS, min(MOST_SLOTS, int(_SHARE * average)) // 16 * 16), average)
    blocks = slots // size + min(number, slots)
    counts = jnp.zeros(number, jnp.int32).at[experts].add(1)
    needed = -(-counts // size)
    first_block, first_slot = jnp.cumsum(needed) - needed, jnp.cumsum(counts) - counts
    order = jnp.argsort(experts, stable=True)
    sorted_experts = experts[order]
    rank = jnp.arange(slots) - first_slot[sorted_experts]
    places = first_block[sorted_experts] * size + rank
    slot = jnp.zeros(blocks * size, jnp.int32).at[places].set(order, unique_indices=True)
    real = jnp.zeros(blocks * size, bool).at[places].set(True, unique_indices=True)
    expert = jnp.searchsorted(jnp.cumsum(needed), jnp.arange(blocks), side="right")
    return _Blocks(
        jnp.minimum(expert, number - 1),
        slot.reshape(blocks, size),
        real.reshape(blocks, size),
        jnp.zeros(slots, jnp.int32).at[order].set(places, unique_indices=True),
    )


@jax.custom_vjp
def _swiglu(
    inputs: Float[Array, "N S D"],
    factors: Float[Array, "N S"],
    experts: Int[Array, " N"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N S D"]:
    """factor * (silu(x G_e) * (x U_e)) D_e of every place, one block after the other."""

    def block(_, operands):
        x, factor, expert = operands
        hidden = nnx.silu(x @ gate[expert]) * (x @ up[expert])
        return None, (factor[:, None] * (hidden @ down[expert])).astype(x.dtype)

    return jax.lax.scan(block, None, (inputs, factors, experts))[1]


def _swiglu_fwd(*operands):
    return _swiglu(*operands), operands


def _swiglu_bwd(operands, gradients):
    # By hand, because the transpose of a scan would add a gradient of all experts at each of its blocks.
    inputs, factors, experts, gate, up, down = operands

    def block(sums, operands):
        x, factor, expert, dy = operands
        g, u = x @ gate[expert], x @ up[expert]
        hidden, gradient_of = jax.vjp(lambda g, u: nnx.silu(g) * u, g, u)
        d_scaled = dy @ down[expert].T
        d_factor = jnp.sum(d_scaled.astype(jnp.float32) * hidden, axis=-1)
        dg, du = gradient_of((factor[:, None] * d_scaled).astype(hidden.dtype))
        scaled = (factor[:, None] * hidden).astype(hidden.dtype)
        parts = (_outer(x, dg), _outer(x, du), _outer(scaled, dy))
        sums = tuple(_added(total, expert, part) for total, part in zip(sums, parts, strict=True))
        return sums, (dg @ gate[expert].T + du @ up[expert].T, d_factor)

    zeros = tuple(jnp.zeros(weight.shape, jnp.float32) for weight in (gate, up, down))
    sums, (d_inputs, d_factors) = jax.lax.scan(block, zeros, (inputs, factors, experts, gradients))
    sums = (total.astype(weight.dtype) for total, weight in zip(sums, (gate, up, down), strict=True))
    return d_inputs, d_factors, None, *sums


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _added(total: Float[Array, "E I O"], expert: Int[Array, ""], part: Float[Array, "I O"]) -> Float[Array, "E I O"]:
    # A slice that is put back, which compilers do in place; a scatter they may not.
    return jax.lax.dynamic_update_index_in_dim(total, total[expert] + part, expert, 0)


def _outer(x: Float[Array, "S I"], y: Float[Array, "S O"]) -> Float[Array, "I O"]:
    """x^T y, accumulated in float32."""
    # The CPU backend lacks some products of bfloat16 that are float32.
    dtype = jnp.float32 if program_device().platform == "cpu" else x.dtype
    return jnp.einsum("si,so->io", x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
