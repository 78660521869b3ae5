"""Embedding lookup that gathers no table, and whose gradient is summed in float32 where the table's part is.

With rows and the table's columns split over "fsdp", a device looks up its columns for the tokens of all, and hands each
device those of its own rows; gradients go the same way back. That moves hidden states, not the table, and no device
holds a gradient of the whole table.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dataflex_jax.sharding import (
    BATCH_AXES,
    all_gather,
    all_to_all,
    divisible_axis,
    gather_weight,
    map_rows,
    program_device,
    rows_are_split,
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VxD: Float[Array, "V D"], tokens_BxT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """The rows of the table that the tokens name, in `dtype`.

    A frequent token's gradient has thousands of terms, which a scatter-add in bfloat16 would lose; here it is float32.
    """
    if not rows_are_split(tokens_BxT.shape[0]):
        return gather_weight(table_VxD, dtype, ("tensor", "fsdp"))[tokens_BxT]
    vocab, width = _axes(table_VxD.shape)

    def lookup(table, tokens):
        tokens, here = _local(all_gather(tokens, 0, width), table.shape[0], vocab)
        found = jnp.where(here[..., None], table.astype(dtype)[tokens], 0)
        return _channels_last(all_to_all(found if vocab is None else jax.lax.psum(found, vocab), 0, 2, width))

    return map_rows(lookup, (P(vocab, width), P(BATCH_AXES)), P(BATCH_AXES))(table_VxD, tokens_BxT)


def _embed_fwd(table, tokens, dtype):
    return embed(table, tokens, dtype), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _embed_bwd(dtype, residuals, grad):
    tokens, like_table = residuals
    shape = like_table.shape[0], grad.shape[-1]
    if not rows_are_split(tokens.shape[0]):
        return _summed(tokens, grad, shape[0], None).astype(like_table.dtype), None
    vocab, width = _axes(shape)

    def summed(tokens, grad):
        rows = shape[0] // (jax.lax.axis_size(vocab) if vocab else 1)
        d_table = _summed(all_gather(tokens, 0, width), all_to_all(grad, 2, 0, width), rows, vocab)
        others = BATCH_AXES if width is None else tuple(axis for axis in BATCH_AXES if axis != width)
        return jax.lax.psum(d_table, others).astype(like_table.dtype)

    return map_rows(summed, (P(BATCH_AXES), P(BATCH_AXES)), P(vocab, width))(tokens, grad), None


embed.defvjp(_embed_fwd, _embed_bwd)


def _channels_last(hidden):
    """`hidden`, in memory a token after the other.

    Channels arrive by device, and XLA's GPU compiler would lay the whole residual stream so, with every norm in two
    kernels in place of one.
    """
    if program_device().platform == "cpu":
        return hidden
    return with_layout_constraint(hidden, Layout(major_to_minor=tuple(range(hidden.ndim))))


def _axes(shape):
    """The mesh axes over which a table's [V, D] is split inside `map_rows`."""
    return divisible_axis("tensor", shape[0]), divisible_axis("fsdp", shape[1])


def _summed(tokens, grad, rows, vocab_axis):
    """[rows, columns of grad]: each token's gradients here, in float32."""
    tokens, here = _local(tokens, rows, vocab_axis)
    grad = jnp.where(here[..., None], grad, 0).astype(jnp.float32)
    return jnp.zeros((rows, grad.shape[-1]), jnp.float32).at[tokens].add(grad)


def _local(tokens, rows, vocab_axis):
    """(index into this device's `rows` of the vocabulary, whether the token is among them)."""
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * rows
    here = (tokens >= first) & (tokens < first + rows)
    return jnp.where(here, tokens - first, 0), here
