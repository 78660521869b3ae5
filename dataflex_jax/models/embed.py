"""Embedding lookup whose gradient is summed in float32, and locally before devices exchange it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dataflex_jax.sharding import (
    BATCH_AXES,
    all_gather,
    divisible_axis,
    gather_weight,
    map_rows,
    reduce_grad,
    rows_are_split,
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VxD: Float[Array, "V D"], tokens_BxT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """The rows of the table that the tokens name, in `dtype`.

    A frequent token's gradient has thousands of terms, which a scatter-add in bfloat16 would lose; here it is float32.
    With rows split over a mesh, the table is gathered over "fsdp" in `dtype`, its gradient is summed on each device
    first, and each part of the vocabulary looks up its own tokens.
    """
    if not rows_are_split(tokens_BxT.shape[0]):
        return gather_weight(table_VxD, dtype, ("tensor", "fsdp"))[tokens_BxT]
    vocab, width = divisible_axis("tensor", table_VxD.shape[0]), divisible_axis("fsdp", table_VxD.shape[1])

    def lookup(table, tokens):
        table = all_gather(table.astype(dtype), 1, width)
        tokens, here = _local(tokens, table.shape[0], vocab)
        found = jnp.where(here[..., None], table[tokens], 0)
        return found if vocab is None else jax.lax.psum(found, vocab)

    return map_rows(lookup, (P(vocab, width), P(BATCH_AXES)), P(BATCH_AXES))(table_VxD, tokens_BxT)


def _embed_fwd(table, tokens, dtype):
    return embed(table, tokens, dtype), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _embed_bwd(dtype, residuals, grad):
    tokens, like_table = residuals
    vocab_size, width = like_table.shape[0], grad.shape[-1]
    split = rows_are_split(tokens.shape[0])
    vocab_axis = divisible_axis("tensor", vocab_size) if split else None

    def scatter(tokens, grad):
        rows = vocab_size // (jax.lax.axis_size(vocab_axis) if vocab_axis else 1)
        tokens, here = _local(tokens, rows, vocab_axis)
        grad = jnp.where(here[..., None], grad, 0).astype(jnp.float32)
        return jnp.zeros((rows, width), jnp.float32).at[tokens].add(grad)

    if not split:
        return scatter(tokens, grad).astype(like_table.dtype), None
    width_axis = divisible_axis("fsdp", width)

    def scatter_and_reduce(tokens, grad):
        return reduce_grad(scatter(tokens, grad), 1, width_axis).astype(like_table.dtype)

    scatter_and_reduce = map_rows(scatter_and_reduce, (P(BATCH_AXES), P(BATCH_AXES)), P(vocab_axis, width_axis))
    return scatter_and_reduce(tokens, grad), None


embed.defvjp(_embed_fwd, _embed_bwd)


def _local(tokens, rows, vocab_axis):
    """(index into this device's `rows` of the vocabulary, whether the token is among them)."""
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * rows
    here = (tokens >= first) & (tokens < first + rows)
    return jnp.where(here, tokens - first, 0), here
