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


def lora_config(section: ConfigDict) -> LoraConfig | None:
    """What `config.lora` asks for; None where its rank is 0.

    Raises:
        InputError: an unknown target module, named, or another value that is not accepted.
    """
    if not section.rank:
        return None
    return LoraConfig(**{field.name: section[field.name] for field in dataclasses.fields(LoraConfig)})


def merge(params: PyTree, adapters: PyTree, lora: LoraConfig, dtype: str | None = None) -> PyTree[Array]:
    """The parameters of a model without adapters that computes the same: kernels W + scale * A B, the rest as it is.

    Products and sums are float32 and rounded once; one layer at a time, so that no stacked kernel is in float32 on the
    way.

    Args:
        params: of the model without adapters.
        adapters: the factors alone, as `Model.params` holds them.
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
