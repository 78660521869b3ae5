"""Causal attention through `jax.nn.dot_product_attention`, on the backend that is valid for the inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ATTENTION_IMPLEMENTATIONS
from dataflex_jax.sharding import program_device


def choose_implementation(
    requested: str, *, backend: str, dtype: jnp.dtype, head_dim: int, has_segments: bool, hopper: bool = False
) -> str:
    """The backend of `jax.nn.dot_product_attention` to use: "xla" or "cudnn".

    Args:
        requested: "auto" (cuDNN where it is valid, else XLA), "xla" or "cudnn".
        backend: JAX's platform, such as "cpu" or "gpu".
        dtype: of the queries, keys and values.
        head_dim: channels a head.
        has_segments: whether packed segments must be kept apart.
        hopper: whether the GPU is of compute capability 9.0 or later, which allows heads of up to 256 channels.

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
    elif has_segments:
        problem = "cannot keep packed segments apart"
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
    sliding_window: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(Q K^T / sqrt(H)) V under a causal mask; N / K query heads share a key head; softmax in float32.

    Args:
        query: rotated queries.
        key: rotated keys.
        value: values.
        segment_ids: tokens attend only within equal ids; None: one segment a row.
        sliding_window: a query sees this many latest keys, its own included; None: all earlier ones.
        implementation: see `choose_implementation`.
    """
    seq_len, head_dim = query.shape[-3], query.shape[-1]
    device = program_device()
    hopper = device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 9.0
    chosen = choose_implementation(
        implementation,
        backend=device.platform,
        dtype=query.dtype,
        head_dim=head_dim,
        has_segments=segment_ids is not None,
        hopper=hopper,
    )
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    # A window as long as the row is no window, and without one the backend has less to mask.
    window = None if sliding_window is None or sliding_window >= seq_len else (sliding_window - 1, 0)
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, local_window_size=window, implementation=chosen
    )
    # cuDNN's is told by `is_fused_attention`; with a name too it would be kept twice.
    return attended if chosen == "cudnn" else checkpoint_name(attended, "attended")


def is_fused_attention(primitive: Primitive, *operands: Any, **parameters: Any) -> bool:
    """A `jax.checkpoint` policy that keeps what cuDNN's attention returns: [B, T, N, H] and softmax statistics.

    Its backward pass needs both and does not compute them again, unlike XLA's, which needs all scores.
    """
    del operands, parameters
    return primitive.name.startswith("dot_product_attention_fwd")
