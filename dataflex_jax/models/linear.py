"""The linear layer of the blocks, with an optional low-rank adapter beside its kernel."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.layout import LORA_MODULES

# (the weight's path in the block, layer index, x [B, T, I], weight [I, O]) -> [B, T, O]
Product = Callable[[str, Int[Array, ""], Float[Array, "B T I"], Float[Array, "I O"]], Float[Array, "B T O"]]


def dot_general(x: Float[Array, "B T I"], weight: Float[Array, "I O"], *_: Any, **__: Any) -> Float[Array, "B T O"]:
    """x @ weight, for `nnx.Linear`."""
    # With rows and tokens in one axis XLA's CPU backend takes the operands of the weight's gradient as they lie;
    # otherwise it transposes one of them first, which takes longer than the product.
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)


class AdaptedLinear(nnx.Linear):
    """y = W x + b + scale * B A dropout(x), with `lora_a` [in, rank] uniform and `lora_b` [rank, out] zero at first.

    Neither W + BA nor any other array of W's size is made. Both factors are used in the dtype of the layer.
    """

    factor_product = None  # see `set_product`

    def __init__(self, cfg: ModelConfig, name: str, inputs: int, outputs: int, *, rngs: nnx.Rngs, **linear):
        super().__init__(inputs, outputs, rngs=rngs, **linear)
        rank, dtype = cfg.lora.rank, jnp.dtype(cfg.param_dtype)
        # Kaiming's uniform with a = sqrt(5), as PEFT draws it.
        bound = 1 / math.sqrt(inputs)
        self.lora_a = nnx.Param(jax.random.uniform(rngs.lora(), (inputs, rank), dtype, -bound, bound))
        self.lora_b = nnx.Param(jnp.zeros((rank, outputs), dtype))
        self.scale = cfg.lora.scale
        self.dropout = cfg.lora.dropout
        self.index = LORA_MODULES.index(name)
        self.dropout_keys = nnx.data(None)

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Applies the layer; with dropout where `set_dropout` was called."""
        y = super().__call__(x)
        if self.dropout_keys is not None:
            keys = _fold_in_each(self.dropout_keys, self.index)
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:]))(keys)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        x, a, b = (v.astype(self.dtype) for v in (x, self.lora_a[...], self.lora_b[...]))
        product = self.factor_product or (lambda _, x, weight: dot_general(x, weight))
        return y + product("lora_b", product("lora_a", x, a) * self.scale, b)


def linear(cfg: ModelConfig, name: str, rngs: nnx.Rngs, use_bias: bool = False) -> nnx.Linear:
    """The block's linear layer of that name in `layout.LORA_MODULES`, with its adapter if it has one."""
    widths = cfg.linear_widths()[name]
    if cfg.lora is not None and name in cfg.lora.target_modules:
        return AdaptedLinear(cfg, name, *widths, use_bias=use_bias, **kernel_options(cfg), rngs=rngs)
    return nnx.Linear(*widths, use_bias=use_bias, **kernel_options(cfg), rngs=rngs)


def kernel_options(cfg: ModelConfig) -> dict[str, Any]:
    """What the linear layers of a model have in common, for `nnx.Linear`."""
    return {
        "dtype": jnp.dtype(cfg.dtype),
        "param_dtype": jnp.dtype(cfg.param_dtype),
        "kernel_init": nnx.initializers.normal(cfg.initializer_range),
        "dot_general": dot_general,
    }


def set_dropout(block: nnx.Module, row_keys: PRNGKeyArray | None, layer: int | Array) -> None:
    """Switches on the adapters' dropout in a block.

    Args:
        block: merged for one application.
        row_keys: one key a row, [B]; a row's masks depend on its key, the layer and the module, on nothing else. None:
            no dropout.
        layer: the block's index.
    """
    modules = [m for _, m in nnx.iter_graph(block) if isinstance(m, AdaptedLinear) and m.dropout > 0]
    if row_keys is None or not modules:
        return
    keys = _fold_in_each(row_keys, layer)
    for module in modules:
        module.dropout_keys = keys


def set_product(block: nnx.Module, product: Product, layer: int | Array) -> None:
    """Has `product` compute every x @ weight of a block's linear layers, adapters included.

    Args:
        block: merged for one application.
        product: called with the weight's path in the block, such as "attention/q_proj/kernel", the layer's index, x and
            the weight, both in the dtype of the layer.
        layer: the block's index.
    """

    def named(prefix):
        return lambda name, x, weight: product(f"{prefix}/{name}", layer, x, weight)

    for path, module in list(nnx.iter_graph(block)):
        if not isinstance(module, nnx.Linear):
            continue
        of_module = named("/".join(map(str, path)))
        module.dot_general = lambda x, kernel, *_, of_module=of_module, **__: of_module("kernel", x, kernel)
        if isinstance(module, AdaptedLinear):
            module.factor_product = of_module


def _fold_in_each(keys, number):
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
