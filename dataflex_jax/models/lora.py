"""Low-rank adapters: what the configuration asks for, and merging them into the kernels.

With `ModelConfig.lora` set, a decoder's parameters hold `lora_a` [layers, in, rank] and `lora_b` [layers, rank, out]
beside every adapted kernel, stacked over layers and scanned like it: fresh ones A uniform in +-1/sqrt(in) (Kaiming's
with a = sqrt(5), as in PEFT), B zero. A `Model` trains them and holds the rest frozen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from dataflex_jax.models.config import LoraConfig
from dataflex_jax.models.layout import FACTORS


def lora_config(section: ConfigDict) -> LoraConfig | None:
    """What `config.lora` asks for; None where its rank is 0.

    Raises:
        InputError: an unknown target module, named, or another value that is not accepted.
    """
    if not section.rank:
        return None
    return LoraConfig(**{field.name: section[field.name] for field in dataclasses.fields(LoraConfig)})


def merge(params: PyTree[Array], lora: LoraConfig, dtype: str | None = None) -> PyTree[Array]:
    """The parameters of a model without adapters that computes the same: kernels W + scale * A B, the rest as it is.

    Products and sums are float32 and rounded once; one layer at a time, so that no stacked kernel is in float32 on the
    way.

    Args:
        params: with adapters.
        lora: their configuration.
        dtype: of the merged kernels; None: what they had.
    """
    if not isinstance(params, dict):
        return params
    merged = {name: merge(value, lora, dtype) for name, value in params.items() if not name.endswith(FACTORS)}
    # A linear layer's factors are beside its kernel; those of experts have the kernel's name before their own.
    for name in params:
        if name.endswith("lora_a"):
            kernel, b = name.removesuffix("lora_a").removesuffix("_") or "kernel", name.removesuffix("a") + "b"
            factors = params[kernel], params[name], params[b]
            merged[kernel] = _merged(*factors, lora.scale, dtype or params[kernel].dtype)
    return merged


@functools.partial(jax.jit, static_argnames="dtype")
def _merged(kernel, a, b, scale, dtype):
    def layer(factors):
        kernel, a, b = (factor.astype(jnp.float32) for factor in factors)
        return (kernel + scale * jnp.matmul(a, b, precision="highest")).astype(dtype)

    return jax.lax.map(layer, (kernel, a, b))
