"""Attention of packed rows by cuDNN, which is told where each segment of a row begins and how long it is.

JAX has no public name for it: `jax.nn.dot_product_attention` has neither offsets nor several lengths a row.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.sharding import BATCH_AXES, divisible_axis, map_rows, rows_are_split

# Before, the offsets of keys and values were multiplied by the number of query heads, which is wrong where they have
# fewer heads of their own.
_OFFSETS_BY_OWN_HEADS = jax.__version_info__ >= (0, 11, 1)
_OFFSETS = 2**31  # they are int32


@jax.custom_vjp
def packed_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    lengths: Int[Array, "B M"],
) -> Float[Array, "B T N H"]:
    """softmax(Q K^T / sqrt(H)) V under a causal mask inside each segment; N / K query heads share a key head.

    Its backward pass runs the forward one again: what that would keep, the softmax statistics, cuDNN lays out as
    [B * M, N, T], and the segments are short. Where the block is recomputed anyway, it is one run for both.

    Args:
        query: rotated queries, bfloat16 or float16, on a GPU of compute capability 9.0 or later.
        key: rotated keys.
        value: values.
        lengths: from `segment_lengths`; every token is in a segment, as what cuDNN gives outside of them is anything.

    Raises:
        InputError: more numbers a device than offsets of 32 bits reach.
    """
    return _forward(query, key, value, lengths)


def _packed_fwd(query, key, value, lengths):
    return _forward(query, key, value, lengths), (query, key, value, lengths)


def _packed_bwd(residuals, gradient):
    return (*_backward(*residuals, gradient), None)


packed_attention.defvjp(_packed_fwd, _packed_bwd)


def segment_lengths(segment_ids: Int[Array, "B T"], most_segments: int) -> Int[Array, "B M"]:
    """The lengths of the runs of equal ids in each row, in their order, then zeros; M = `most_segments`."""
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    run = jnp.pad(jnp.cumsum(begins, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return jnp.sum(run[:, None, :] == jnp.arange(most_segments)[:, None], axis=-1, dtype=jnp.int32)


def lengths_and_offsets(lengths: Int[Array, "B M"]) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
    """(lengths, starts within the row) of the segments as JAX wants them for cuDNN: -1 where there is none."""
    there = lengths > 0
    starts = jnp.where(there, jnp.cumsum(lengths, axis=1) - lengths, -1)
    return jnp.where(there, lengths, -1), jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


def _on_one_device(query, key, value, lengths):
    if query.size >= _OFFSETS:
        rows, tokens, heads, width = query.shape
        reason = f"cannot number {rows} x {tokens} tokens of {heads} x {width} channels a device"
        raise InputError(f"model attention='cudnn' {reason}; smaller microbatches or 'xla' can be used")
    if not _OFFSETS_BY_OWN_HEADS:
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    of_segments, offsets = lengths_and_offsets(lengths)
    # With the statistics, so that XLA finds the recomputed call and the one for the gradients to be the same.
    attended, _ = cudnn.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=of_segments,
        kv_seqlen=of_segments,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1.0 / math.sqrt(query.shape[-1]),
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
        return_residual=True,
    )
    return attended


def _gradients_on_one_device(query, key, value, lengths, gradient):
    _, transposed = jax.vjp(lambda *projected: _on_one_device(*projected, lengths), query, key, value)
    return transposed(gradient)


def _over_rows(local: Callable, results: int) -> Callable:
    """`local` of queries, keys, values, lengths and so on, on each device of the mesh for its own rows and heads.

    Under `jax.vmap`, of which cuDNN's lengths and offsets know nothing, the mapped axis becomes more rows.
    """

    @jax.custom_batching.custom_vmap
    def over_rows(query, *others):
        arrays = (query, *others)
        if not rows_are_split(query.shape[0]):
            return local(*arrays)
        # All heads of a group must be on one device.
        heads = divisible_axis("tensor", math.gcd(query.shape[2], others[0].shape[2]))
        split = P(BATCH_AXES, None, heads, None)
        in_specs = tuple(split if x.ndim == 4 else P(BATCH_AXES, None) for x in arrays)
        return map_rows(local, in_specs, split if results == 1 else (split,) * results)(*arrays)

    @over_rows.def_vmap
    def _(size, batched, *arrays):
        whole = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(arrays, batched, strict=True)
        ]
        found = over_rows(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        apart = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), found)
        return apart, jax.tree.map(lambda _: True, apart)

    return over_rows


_forward = _over_rows(_on_one_device, 1)
_backward = _over_rows(_gradients_on_one_device, 3)
