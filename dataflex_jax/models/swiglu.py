"""The experts themselves: blocks of rows through SwiGLU, each block with the weights of one expert.

N blocks of S rows of D channels, E experts of width F.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dataflex_jax.models import grouped
from dataflex_jax.sharding import program_device


class Weights(NamedTuple):
    """Of experts."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def swiglu(
    inputs: Float[Array, "N S D"],
    factors: Float[Array, "N S"],
    grouping: grouped.Grouping,
    weights: Weights,
    by_kernel: bool,
) -> Float[Array, "N S D"]:
    """factor * (silu(x G_e) * (x U_e)) D_e of every row, e its block's expert.

    Args:
        inputs: the blocks.
        factors: of the rows, float32; 0 of padding.
        grouping: which expert each block goes to; of blocks that are not used, and their gradients, all is undefined.
        weights: of the experts, in the dtype of the inputs.
        by_kernel: by `grouped`, all blocks at a time; else one block after the other.
    """
    if by_kernel:
        gate, up = (grouped.product(inputs, weight, grouping) for weight in (weights.gate, weights.up))
        return grouped.scaled_product(nnx.silu(gate) * up, weights.down, grouping, factors)

    def block(_, operands):
        x, factor, expert = operands
        hidden = nnx.silu(x @ weights.gate[expert]) * (x @ weights.up[expert])
        return None, (factor[:, None] * (hidden @ weights.down[expert])).astype(x.dtype)

    return jax.lax.scan(block, None, (inputs, factors, grouping.number))[1]


def _fwd(inputs, factors, grouping, weights, by_kernel):
    return swiglu(inputs, factors, grouping, weights, by_kernel), (inputs, factors, grouping, weights)


def _bwd(by_kernel, operands, dy):
    return (_all_at_a_time if by_kernel else _one_by_one)(*operands, dy)


swiglu.defvjp(_fwd, _bwd)


def _all_at_a_time(inputs, factors, grouping, weights, dy):
    gate, up = (grouped.product(inputs, weight, grouping) for weight in (weights.gate, weights.up))
    d_scaled = grouped.product(dy, weights.down, grouping, True)
    scaled, dg, du, d_factors = _elementwise(gate, up, factors, d_scaled)
    d_inputs = grouped.product(dg, weights.gate, grouping, True) + grouped.product(du, weights.up, grouping, True)
    pairs = zip(weights, ((inputs, dg), (inputs, du), (scaled, dy)), strict=True)
    d_weights = Weights(*(grouped.outer(x, d, grouping, weight.dtype) for weight, (x, d) in pairs))
    return d_inputs, d_factors, None, d_weights


def _one_by_one(inputs, factors, grouping, weights, dy):
    # By hand, because the transpose of a scan would add a gradient of all experts at each of its blocks.
    def block(sums, operands):
        x, factor, expert, dy = operands
        gate, up, down = (weight[expert] for weight in weights)
        scaled, dg, du, d_factor = _elementwise(x @ gate, x @ up, factor, dy @ down.T)
        parts = (_outer(x, dg), _outer(x, du), _outer(scaled, dy))
        sums = tuple(_added(total, expert, part) for total, part in zip(sums, parts, strict=True))
        return sums, (dg @ gate.T + du @ up.T, d_factor)

    zeros = tuple(jnp.zeros(weight.shape, jnp.float32) for weight in weights)
    sums, (d_inputs, d_factors) = jax.lax.scan(block, zeros, (inputs, factors, grouping.number, dy))
    d_weights = Weights(*(total.astype(weight.dtype) for total, weight in zip(sums, weights, strict=True)))
    return d_inputs, d_factors, None, d_weights


def _elementwise(gate, up, factors, d_scaled):
    """(factor * hidden, the gradients of gate, up and the factors); `d_scaled` is the first one's gradient."""
    hidden, gradient_of = jax.vjp(lambda gate, up: nnx.silu(gate) * up, gate, up)
    d_factors = jnp.sum(d_scaled.astype(jnp.float32) * hidden, axis=-1)
    d_gate, d_up = gradient_of((factors[..., None] * d_scaled).astype(hidden.dtype))
    return (factors[..., None] * hidden).astype(hidden.dtype), d_gate, d_up, d_factors


def _added(total: Float[Array, "E I O"], expert: Int[Array, ""], part: Float[Array, "I O"]) -> Float[Array, "E I O"]:
    # A slice that is put back, which compilers do in place; a scatter they may not.
    return jax.lax.dynamic_update_index_in_dim(total, total[expert] + part, expert, 0)


def _outer(x: Float[Array, "S I"], y: Float[Array, "S O"]) -> Float[Array, "I O"]:
    """x^T y, accumulated in float32."""
    # The CPU backend lacks some products of bfloat16 that are float32.
    dtype = jnp.float32 if program_device().platform == "cpu" else x.dtype
    return jnp.einsum("si,so->io", x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
