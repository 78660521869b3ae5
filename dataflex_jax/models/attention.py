"""Causal attention on the backend that is valid for the inputs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ATTENTION_IMPLEMENTATIONS
from dataflex_jax.models.packed_attention import packed_attention, segment_lengths
from dataflex_jax.sharding import BATCH_AXES, constrain, program_device

_FUSED = "fused_attention"


def choose_implementation(
    requested: str,
    *,
    backend: str,
    dtype: jnp.dtype,
    head_dim: int,
    has_segments: bool,
    most_segments: int | None = None,
    windowed: bool = False,
    hopper: bool = False,
) -> str:
    """The backend of attention to use: "xla" or "cudnn".

    Args:
        requested: "auto" (cuDNN where it is valid, else XLA), "xla" or "cudnn".
        backend: JAX's platform, such as "cpu" or "gpu".
        dtype: of the queries, keys and values.
        head_dim: channels a head.
        has_segments: whether packed segments must be kept apart.
        most_segments: how many of them a row has at most, where that is known.
        windowed: whether a query sees fewer keys than all earlier ones of the row.
        hopper: whether the GPU is of compute capability 9.0 or later, which allows heads of up to 256 channels, and
            packed segments.

    Raises:
        InputError: "cudnn" was asked for where it would fail or would ignore the segments; or an unknown name.
    """
    if requested not in ATTENTION_IMPLEMENTATIONS:
        raise InputError(f"model attention={requested!r} is not supported; accepted: {ATTENTION_IMPLEMENTATIONS}")
    if requested == "xla":
        return "xla"
    max_head_dim = 256 if hopper else 128
    problem = None
    if backend != "gpu":
        problem = f"needs a GPU, not {backend!r}"
    elif dtype not in (jnp.bfloat16, jnp.float16):
        problem = f"needs dtype bfloat16, not {jnp.dtype(dtype).name}"
    elif head_dim % 8 or head_dim > max_head_dim:
        problem = f"needs head_dim a multiple of 8 up to {max_head_dim}, not {head_dim}"
    elif has_segments and not hopper:
        problem = "cannot keep packed segments apart on a GPU of compute capability below 9.0"
    elif has_segments and windowed:
        problem = "has no sliding window among packed segments"
    elif has_segments and most_segments is None:
        problem = "must know how many packed segments a row has at most (most_segments)"
    if problem is None:
        return "cudnn"
    if requested == "cudnn":
        raise InputError(f"model attention='cudnn' {problem}; accepted here: 'auto' or 'xla'")
    return "xla"


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    most_segments: int | None = None,
    sliding_window: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(Q K^T / sqrt(H)) V under a causal mask; N / K query heads share a key head; softmax in float32.

    Args:
        query: rotated queries.
        key: rotated keys.
        value: values.
        segment_ids: tokens attend only within equal ids, which stand side by side; None: one segment a row.
        most_segments: how many different ids a row has at most, which cuDNN must know; None: unknown.
        sliding_window: a query sees this many latest keys, its own included; None: all earlier ones.
        implementation: see `choose_implementation`.
    """
    seq_len, head_dim = query.shape[-3], query.shape[-1]
    # A window as long as the row is no window, and without one the backend has less to mask.
    window = None if sliding_window is None or sliding_window >= seq_len else (sliding_window - 1, 0)
    device = program_device()
    chosen = choose_implementation(
        implementation,
        backend=device.platform,
        dtype=query.dtype,
        head_dim=head_dim,
        has_segments=segment_ids is not None,
        most_segments=most_segments,
        windowed=window is not None,
        hopper=device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 9.0,
    )
    if chosen == "cudnn":
        query, key, value = split_by_heads(query, key, value)
    if chosen == "cudnn" and segment_ids is not None:
        attended = packed_attention(query, key, value, segment_lengths(segment_ids, most_segments))
        return checkpoint_name(attended, _FUSED)
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, local_window_size=window, implementation=chosen
    )
    if chosen == "xla":
        return checkpoint_name(attended, "attended")
    # Split as the queries, so that its gradient is too: cuDNN's call refuses parts of heads.
    # It is told by `is_fused_attention`; with a name too it would be kept twice.
    return _split(attended) if _parts() > 1 else attended


def split_by_heads(
    query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T R H"], Float[Array, "B T R H"]]:
    """The three, split alike over the mesh's "tensor", as a fused attention wants them.

    A mesh with more parts than there are key heads splits the query heads all the same: key heads are repeated as often
    as it takes. Where it does not divide the query heads either, every part has all heads.

    Args:
        query: rotated queries.
        key: rotated keys.
        value: values.
    """
    parts, of_keys = _parts(), key.shape[2]
    if parts == 1:
        return query, key, value
    repeats = 1 if query.shape[2] % parts else math.lcm(of_keys, parts) // of_keys
    if repeats > 1:
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    return tuple(_split(x) for x in (query, key, value))


def _parts() -> int:
    """Of the mesh's "tensor"."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def _split(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Heads over "tensor", or all of them on every device."""
    return constrain(x, BATCH_AXES, None, None if x.shape[2] % _parts() else "tensor", None)


def is_fused_attention(primitive: Primitive, *operands: Any, **parameters: Any) -> bool:
    """A `jax.checkpoint` policy that keeps what cuDNN's attention returns: [B, T, N, H] and softmax statistics.

    Its backward pass needs both and does not compute them again, unlike XLA's, which needs all scores. Of packed rows
    it does, and [B, T, N, H] alone is kept.
    """
    del operands
    if primitive.name == "name":
        return parameters["name"] == _FUSED
    return primitive.name.startswith("dot_product_attention_fwd")
