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
    """Of experts.

    Attributes:
        gate: the kernels.
        up: as `gate`.
        down: as `gate`.
        adapters: of each of the three, A [E, in, r] and B [E, r, out], whose product is added to it; (): none.
    """

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    adapters: tuple[tuple[Array, ...], ...] = ((), (), ())

    @property
    def kernels(self) -> tuple[Array, Array, Array]:
        """Without the adapters."""
        return self[:3]


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
    if any(weights.adapters):
        return _adapted(inputs, factors, grouping, weights, by_kernel)
    return _plain(inputs, factors, grouping, weights, by_kernel)


def _adapted(inputs, factors, grouping, weights, by_kernel):
    # Neither W + A B nor another array of the kernels' size is made.
    def product(x, weight):
        return grouped.product(x, weight, grouping) if by_kernel else _scanned(x, weight, grouping.number)

    def through(x, kernel, pair):
        y = product(x, kernel)
        if not pair:
            return y
        a, b = pair
        if by_kernel:
            padding = -a.shape[2] % grouped.LEAST_ROWS
            a, b = jnp.pad(a, ((0, 0), (0, 0), (0, padding))), jnp.pad(b, ((0, 0), (0, padding), (0, 0)))
        return y + product(product(x, a), b)

    gate, up, down = zip(weights.kernels, weights.adapters, strict=True)
    hidden = nnx.silu(through(inputs, *gate)) * through(inputs, *up)
    return (factors[..., None] * through(hidden, *down)).astype(inputs.dtype)


@jax.custom_vjp
def _scanned(x: Float[Array, "N S I"], weights: Float[Array, "E I O"], numbers: Int[Array, " N"]):
    """x_n W_e of each block, one after the other."""
    return jax.lax.scan(lambda _, block: (None, block[0] @ weights[block[1]]), None, (x, numbers))[1]


def _scanned_fwd(x, weights, numbers):
    return _scanned(x, weights, numbers), (x, weights, numbers)


def _scanned_bwd(operands, dy):
    x, weights, numbers = operands

    def block(total, operands):
        x, number, dy = operands
        return _added(total, number, _outer(x, dy)), dy @ weights[number].T

    total, dx = jax.lax.scan(block, jnp.zeros(weights.shape, jnp.float32), (x, numbers, dy))
    return dx, total.astype(weights.dtype), None


_scanned.defvjp(_scanned_fwd, _scanned_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _plain(inputs, factors, grouping, weights, by_kernel):
    if by_kernel:
        gate, up = (grouped.product(inputs, weight, grouping) for weight in (weights.gate, weights.up))
        return grouped.scaled_product(nnx.silu(gate) * up, weights.down, grouping, factors)

    def block(x, factor, expert):
        hidden = nnx.silu(x @ weights.gate[expert]) * (x @ weights.up[expert])
        return (factor[:, None] * (hidden @ weights.down[expert])).astype(x.dtype)

    def computed(_, operands):
        index, *operands = operands
        return None, _if_used(index, grouping, block, *operands)

    return jax.lax.scan(computed, None, (_indices(grouping), inputs, factors, grouping.number))[1]


def _plain_fwd(inputs, factors, grouping, weights, by_kernel):
    return _plain(inputs, factors, grouping, weights, by_kernel), (inputs, factors, grouping, weights)


def _plain_bwd(by_kernel, operands, dy):
    return (_all_at_a_time if by_kernel else _one_by_one)(*operands, dy)


_plain.defvjp(_plain_fwd, _plain_bwd)


def _all_at_a_time(inputs, factors, grouping, weights, dy):
    gate, up = (grouped.product(inputs, weight, grouping) for weight in (weights.gate, weights.up))
    d_scaled = grouped.product(dy, weights.down, grouping, True)
    scaled, dg, du, d_factors = _elementwise(gate, up, factors, d_scaled)
    d_inputs = grouped.product(dg, weights.gate, grouping, True) + grouped.product(du, weights.up, grouping, True)
    pairs = zip(weights.kernels, ((inputs, dg), (inputs, du), (scaled, dy)), strict=True)
    d_weights = Weights(*(grouped.outer(x, d, grouping, weight.dtype) for weight, (x, d) in pairs))
    return d_inputs, d_factors, None, d_weights


def _one_by_one(inputs, factors, grouping, weights, dy):
    # By hand, because the transpose of a scan would add a gradient of all experts at each of its blocks.
    def block(x, factor, expert, dy):
        gate, up, down = (weight[expert] for weight in weights.kernels)
        scaled, dg, du, d_factor = _elementwise(x @ gate, x @ up, factor, dy @ down.T)
        return (_outer(x, dg), _outer(x, du), _outer(scaled, dy)), (dg @ gate.T + du @ up.T, d_factor)

    def added(sums, operands):
        index, *operands = operands
        parts, of_rows = _if_used(index, grouping, block, *operands)
        expert = operands[2]
        return tuple(_added(total, expert, part) for total, part in zip(sums, parts, strict=True)), of_rows

    zeros = tuple(jnp.zeros(weight.shape, jnp.float32) for weight in weights.kernels)
    operands = (_indices(grouping), inputs, factors, grouping.number, dy)
    sums, (d_inputs, d_factors) = jax.lax.scan(added, zeros, operands)
    d_weights = Weights(*(total.astype(weight.dtype) for total, weight in zip(sums, weights.kernels, strict=True)))
    return d_inputs, d_factors, None, d_weights


def _indices(grouping):
    return jnp.arange(grouping.number.shape[0])


def _if_used(index, grouping, block, *operands):
    """What `block` makes of its operands; zeros, in no time, where there is no such block."""
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(block, *operands))
    return jax.lax.cond(index < grouping.used, block, lambda *_: zeros, *operands)


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
