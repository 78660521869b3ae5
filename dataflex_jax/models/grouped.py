"""Products of blocks of rows with the weight that each block goes to, as GPU kernels.

N blocks of S rows, E weights [I, O]; the blocks of one weight follow each other. XLA has no such product on GPUs: it
multiplies all rows with all weights, or runs one block after the other. These are written in Pallas and compiled by
Triton; on other platforms they are interpreted, which is slow and for tests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from dataflex_jax.sharding import program_device

# Rows of a block, and outputs of a tile: powers of two, of which tensor cores take no less than 16. What is summed over
# comes in steps of so many bytes, of which three tiles a side fit into the memory of a processor.
LEAST_ROWS, MOST_ROWS = 16, 128
_WIDEST, _STEP_BYTES = 128, 128


class Grouping(NamedTuple):
    """Which weight each block goes to.

    Attributes:
        number: of each block's weight.
        used: how many blocks, from the first on, there are; the others are not computed, and what they have is
            undefined.
        first: the first block of each weight.
        count: how many blocks it has.
    """

    number: Int[Array, " N"]
    used: Int[Array, ""]
    first: Int[Array, " E"]
    count: Int[Array, " E"]


def fits(*widths: int) -> bool:
    """Whether matrices of these widths are made of whole tiles."""
    return all(width % LEAST_ROWS == 0 for width in widths)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    x: Float[Array, "N S I"],
    weights: Float[Array, "E I O"] | Float[Array, "E O I"],
    grouping: Grouping,
    transposed: bool = False,
) -> Float[Array, "N S O"]:
    """x_n W_e of each block n and its weight e, accumulated in float32, in the dtype of `x`.

    Args:
        x: the blocks; S a power of two from `LEAST_ROWS` to `MOST_ROWS`, I and O as `fits` says.
        weights: of which each block takes one.
        grouping: which.
        transposed: weights are [E, O, I].
    """
    return scaled_product(x, weights, grouping, transposed=transposed)


def _product_fwd(x, weights, grouping, transposed):
    return product(x, weights, grouping, transposed), (x, weights, grouping)


def _product_bwd(transposed, residuals, dy):
    x, weights, grouping = residuals
    left, right = (dy, x) if transposed else (x, dy)
    return product(dy, weights, grouping, not transposed), outer(left, right, grouping, weights.dtype), None


product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def outer(
    x: Float[Array, "N S I"], y: Float[Array, "N S O"], grouping: Grouping, dtype: jnp.dtype
) -> Float[Array, "E I O"]:
    """sum_n x_n^T y_n over the blocks of each weight, accumulated in float32, in `dtype`; 0 where there is no block."""
    (_, rows, inputs), outputs, number = x.shape, y.shape[2], grouping.first.shape[0]
    height, width, depth = _tile(inputs, _WIDEST), _tile(outputs, _WIDEST), _depth(rows, x.dtype)
    across, tiles, steps = outputs // width, inputs // height * (outputs // width), rows // depth

    def grouped_outer(first_ref, count_ref, x_ref, y_ref, sums_ref):
        weight, tile = pl.program_id(0) // tiles, pl.program_id(0) % tiles
        channels, columns = pl.ds(tile // across * height, height), pl.ds(tile % across * width, width)

        first = first_ref[weight]

        def add(step, total):
            block, part = first + jax.lax.div(step, steps), pl.ds(jax.lax.rem(step, steps) * depth, depth)
            left, right = triton.load(x_ref.at[block, part, channels]), triton.load(y_ref.at[block, part, columns])
            return total + triton.dot(left, right, trans_a=True)

        total = jax.lax.fori_loop(0, count_ref[weight] * steps, add, jnp.zeros((height, width), jnp.float32))
        triton.store(sums_ref.at[weight, channels, columns], total.astype(sums_ref.dtype))

    shape = jax.ShapeDtypeStruct((number, inputs, outputs), dtype)
    return _call(grouped_outer, number * tiles, shape, grouping.first, grouping.count, x, y)


def _outer_fwd(x, y, grouping, dtype):
    return outer(x, y, grouping, dtype), (x, y, grouping)


def _outer_bwd(dtype, residuals, d_sums):
    x, y, grouping = residuals
    d_sums = d_sums.astype(x.dtype)
    return product(y, d_sums, grouping, True), product(x, d_sums, grouping, False), None


outer.defvjp(_outer_fwd, _outer_bwd)


def scaled_product(
    x: Float[Array, "N S I"],
    weights: Float[Array, "E I O"] | Float[Array, "E O I"],
    grouping: Grouping,
    factors: Float[Array, "N S"] | None = None,
    transposed: bool = False,
) -> Float[Array, "N S O"]:
    """`product`, each row of it times a factor where there are any, before it is rounded; without a derivative."""
    blocks, rows, inputs = x.shape
    outputs = weights.shape[1 if transposed else 2]
    depth, width = _depth(inputs, x.dtype), _tile(outputs, _WIDEST)
    tiles = outputs // width

    def grouped_product(number_ref, used_ref, x_ref, weights_ref, *refs):
        # Tiles of one block are neighbours, so that its rows are read from memory once.
        block, tile = pl.program_id(0) // tiles, pl.program_id(0) % tiles

        @pl.when(block < used_ref[0])
        def _():
            number, columns = number_ref[block], pl.ds(tile * width, width)

            def add(step, total):
                channels = pl.ds(step * depth, depth)
                part = triton.load(x_ref.at[block, :, channels])
                place = (number, columns, channels) if transposed else (number, channels, columns)
                return total + triton.dot(part, triton.load(weights_ref.at[place]), trans_b=transposed)

            total = jax.lax.fori_loop(0, inputs // depth, add, jnp.zeros((rows, width), jnp.float32))
            if factors is not None:
                total *= triton.load(refs[0].at[block, :])[:, None]
            triton.store(refs[-1].at[block, :, columns], total.astype(x.dtype))

    shape = jax.ShapeDtypeStruct((blocks, rows, outputs), x.dtype)
    operands = (grouping.number, grouping.used[None], x, weights, *([] if factors is None else [factors]))
    return _call(grouped_product, blocks * tiles, shape, *operands)


def _call(kernel, programs, shape, *operands):
    call = pl.pallas_call(
        kernel,
        shape,
        grid=(programs,),
        interpret=program_device().platform != "gpu",
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        name=kernel.__name__,
    )
    return call(*operands)


def _depth(width: int, dtype: jnp.dtype) -> int:
    return _tile(width, _STEP_BYTES // jnp.dtype(dtype).itemsize)


def _tile(width: int, most: int) -> int:
    """The largest power of two that divides `width`, at most `most`."""
    return min(width & -width, most)
