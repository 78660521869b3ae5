"""Keys and values of the tokens that a decoder has read, in buffers of fixed size.

The token at position p of its row lies in slot p % C, whatever the row's padding. With a sliding window C need not be
larger than the window: a new token then takes the slot of the one that falls out of sight. Keys are stored rotated, so
that the order of the slots does not matter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.sharding import BATCH_AXES, constrain


class KVCache(NamedTuple):
    """Keys and values of all layers, in the compute dtype; rows split over devices like a batch, heads over "tensor".

    Attributes:
        keys: after the rotary embedding.
        values: as projected.
    """

    keys: Float[Array, "L B K C H"]
    values: Float[Array, "L B K C H"]


def empty(cfg: ModelConfig, num_rows: int, max_tokens: int) -> KVCache:
    """A cache for rows of up to `max_tokens` tokens; with a sliding window, as many slots as it is wide suffice."""
    slots = min(max_tokens, cfg.sliding_window or max_tokens)
    shape = (cfg.num_hidden_layers, num_rows, cfg.num_key_value_heads, slots, cfg.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
    return KVCache(_split(zeros), _split(zeros))


def layers_apart(cache: KVCache) -> tuple[KVCache, ...]:
    """A cache of one layer each, which are read and written without a copy out of all layers'."""
    return tuple(KVCache(*(buffer[i : i + 1] for buffer in cache)) for i in range(cache.keys.shape[0]))


def write_prompts(
    cache: KVCache,
    layer: Int[Array, ""],
    keys: Float[Array, "B P K H"],
    values: Float[Array, "B P K H"],
    lengths_B: Int[Array, " B"],
) -> KVCache:
    """The cache with one layer's keys and values of whole prompts: the last C of each row's first `lengths_B`."""
    slots = cache.keys.shape[3]
    last = lengths_B[:, None] - 1
    # Of the positions that share a slot the latest; a negative one is none yet, and `attend` does not look there.
    positions = last - (last - jnp.arange(slots)) % slots
    index = jnp.maximum(positions, 0)[:, :, None, None]

    def write(buffer, new):
        chosen = jnp.swapaxes(jnp.take_along_axis(new, index, axis=1), 1, 2)
        return _split(jax.lax.dynamic_update_index_in_dim(buffer, chosen, layer, 0))

    return KVCache(write(cache.keys, keys), write(cache.values, values))


def write_tokens(
    cache: KVCache,
    layer: int | Int[Array, ""],
    keys: Float[Array, "B 1 K H"],
    values: Float[Array, "B 1 K H"],
    positions_B: Int[Array, " B"],
) -> KVCache:
    """The cache with one layer's key and value of one more token a row, the one at `positions_B`."""
    slots = positions_B % cache.keys.shape[3]
    places = jnp.stack([jnp.broadcast_to(layer, slots.shape), slots], axis=-1)
    # Not `at[layer, rows, :, slots].set`: that does not say that each row stays in its place, that is on its device.
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2),
        inserted_window_dims=(0, 3),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )

    def write(buffer, new):
        return _split(jax.lax.scatter(buffer, places, new[:, 0], dimensions, unique_indices=True))

    return KVCache(write(cache.keys, keys), write(cache.values, values))


def attend(
    cache: KVCache, layer: int | Int[Array, ""], queries: Float[Array, "B 1 N H"], positions_B: Int[Array, " B"]
) -> Float[Array, "B 1 N H"]:
    """Attention of one query a row, the token at `positions_B`, over its row's tokens up to itself; softmax in float32.

    The token itself must have been written.
    """
    keys, values = (jnp.swapaxes(jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False), 1, 2) for buffer in cache)
    held = jnp.minimum(positions_B + 1, keys.shape[1])
    return jax.nn.dot_product_attention(queries, keys, values, key_value_seq_lengths=held, implementation="xla")


def _split(buffer):
    return constrain(buffer, None, BATCH_AXES, "tensor", None, None)
