"""Low-rank adapters as a pytree of their own beside the frozen parameters.

With `ModelConfig.lora` set, a decoder's parameters hold `lora_a` and `lora_b` beside every adapted kernel, stacked over
layers and scanned like it. `split` takes them apart and `combine` puts them together; both only rearrange dicts. So any
function of (graphdef, params) works with adapters, and derivatives are taken of the part that is trained:

    base, adapters = lora.split(params)
    gradients = jax.grad(lambda adapters: loss(graphdef, lora.combine(base, adapters), batch))(adapters)
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32
from ml_collections import ConfigDict

from dataflex_jax.models import decoder
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.layout import FACTORS


def lora_config(section: ConfigDict) -> LoraConfig | None:
    """What `config.lora` asks for; None where its rank is 0.

    Raises:
        InputError: an unknown target module, named, or another value that is not accepted.
    """
    if not section.rank:
        return None
    return LoraConfig(**{field.name: section[field.name] for field in dataclasses.fields(LoraConfig)})


def init(cfg: ModelConfig, lora: LoraConfig, key: Array) -> PyTree[Array]:
    """Fresh adapters in cfg.param_dtype: A uniform in +-1/sqrt(in) (Kaiming's with a = sqrt(5), as in PEFT), B zero.

    They are those of `decoder.create` with this key. Their paths read like "layers/attention/q_proj/lora_a"; A is
    [layers, in, rank], B [layers, rank, out].
    """
    return _init(dataclasses.replace(cfg, lora=lora), key)


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg, key):
    # Under jit nothing but the adapters is drawn.
    return split(decoder.create(cfg, key)[1])[1]


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(base, adapters): two nested dicts with disjoint leaves."""
    base, adapters = {}, {}
    for name, value in params.items():
        if not isinstance(value, dict):
            (adapters if name in FACTORS else base)[name] = value
            continue
        for tree, part in zip((base, adapters), split(value), strict=True):
            if part:
                tree[name] = part
    return base, adapters


def combine(base: PyTree | None, adapters: PyTree) -> PyTree:
    """The parameters of which `base` and `adapters` are the parts; `adapters` itself where there is no base."""
    if not base:
        return adapters
    combined = dict(base)
    for name, value in adapters.items():
        combined[name] = combine(base.get(name), value) if isinstance(value, dict) else value
    return combined


def merge(params: PyTree, adapters: PyTree, lora: LoraConfig, dtype: str | None = None) -> PyTree[Array]:
    """The parameters of a model without adapters that computes the same: kernels W + scale * A B, the rest as it is.

    Products and sums are float32 and rounded once; one layer at a time, so that no stacked kernel is in float32 on the
    way.

    Args:
        params: of the model without adapters.
        adapters: from `init` or `split`.
        lora: their configuration.
        dtype: of the merged kernels; None: what they had.
    """
    if "lora_a" in adapters:
        kernel, dtype = params["kernel"], dtype or params["kernel"].dtype
        return {**params, "kernel": _merged(kernel, adapters["lora_a"], adapters["lora_b"], lora.scale, dtype)}
    return {
        name: merge(value, adapters[name], lora, dtype) if name in adapters else value for name, value in params.items()
    }


@functools.partial(jax.jit, static_argnames="dtype")
def _merged(kernel, a, b, scale, dtype):
    def layer(factors):
        kernel, a, b = (factor.astype(jnp.float32) for factor in factors)
        return (kernel + scale * jnp.matmul(a, b, precision="highest")).astype(dtype)

    return jax.lax.map(layer, (kernel, a, b))


def fingerprint(params: PyTree) -> str:
    """16 hex digits that tell parameters from others: of paths, shapes, dtypes and bits, however they are split.

    Each array is summed up on its devices; nothing else comes to the host.
    """
    checksums = jax.device_get(jax.tree.map(_checksum, params))
    digest = hashlib.sha256()
    for (path, leaf), checksum in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(checksums), strict=True
    ):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {checksum}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    """A sum modulo 2^32 of every number's bits mixed with its place; integers, so the order does not matter."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # The finalizer of MurmurHash3 over both.
    mixed = bits * jnp.uint32(0xCC9E2D51) + place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
