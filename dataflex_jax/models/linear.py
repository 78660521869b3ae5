"""The linear layer of the blocks, with an optional low-rank adapter beside its kernel."""

import itertools
import math
from collections.abc import Callable, Sequence
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


class Linear(nnx.Linear):
    """y = W x + b, where the gradient of b is summed in float32.

    In bfloat16 a sum over all tokens stops growing when its next term is below half its last bit.
    """

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Applies the layer."""
        y = self.dot_general(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else _with_bias(y, self.bias[...])


@jax.custom_vjp
def _with_bias(y, bias):
    return y + bias.astype(y.dtype)


def _with_bias_fwd(y, bias):
    return _with_bias(y, bias), jnp.zeros((), bias.dtype)


def _with_bias_bwd(like_bias, gradient):
    return gradient, _summed(gradient).astype(like_bias.dtype)


_with_bias.defvjp(_with_bias_fwd, _with_bias_bwd)


def _summed(gradient):
    """The gradient of what was added to all tokens alike."""
    return jnp.sum(gradient, axis=range(gradient.ndim - 1), dtype=jnp.float32)


def of_one_input(x: Float[Array, "B T I"], layers: Sequence[Linear]) -> tuple[Float[Array, "B T _"], ...]:
    """What each of the layers makes of x.

    Plain layers have one product for all in the backward pass, which so reads and sums their gradients once; and one
    for all but the first in the forward pass, where the others are small, as keys and values are beside queries.
    """
    # Outputs that are split over "tensor" would be exchanged to lie side by side; and beside one token's products it
    # would take long to lay the weights so.
    apart = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1 or x.shape[-2] == 1
    if apart or any(type(layer) is not Linear or layer.dot_general is not dot_general for layer in layers):
        return tuple(layer(x) for layer in layers)
    dtype = layers[0].dtype
    weights = tuple(layer.kernel[...].astype(dtype) for layer in layers)
    biases = tuple(None if layer.bias is None else layer.bias[...] for layer in layers)
    outputs = _of_one_input(x.reshape(-1, x.shape[-1]).astype(dtype), weights, biases)
    return tuple(y.reshape(*x.shape[:-1], -1) for y in outputs)


@jax.custom_vjp
def _of_one_input(x, weights, biases):
    first, *others = weights
    outputs = x @ first, *_apart(x @ jnp.concatenate(others, axis=1), others)
    return tuple(y if b is None else y + b.astype(y.dtype) for y, b in zip(outputs, biases, strict=True))


def _of_one_input_fwd(x, weights, biases):
    like_biases = tuple(None if bias is None else jnp.zeros((), bias.dtype) for bias in biases)
    return _of_one_input(x, weights, biases), (x, weights, like_biases)


def _of_one_input_bwd(residuals, gradients):
    x, weights, like_biases = residuals
    together = jnp.concatenate(gradients, axis=1)
    d_weights = _apart(jax.lax.dot_general(x, together, (((0,), (0,)), ((), ()))), weights)
    sums = _apart(_summed(together), weights)
    d_biases = (None if b is None else d.astype(b.dtype) for d, b in zip(sums, like_biases, strict=True))
    return together @ jnp.concatenate(weights, axis=1).T, tuple(d_weights), tuple(d_biases)


_of_one_input.defvjp(_of_one_input_fwd, _of_one_input_bwd)


def _apart(together, weights):
    """The columns that are of each of the weights."""
    ends = itertools.accumulate(weight.shape[1] for weight in weights[:-1])
    return jnp.split(together, list(ends), axis=-1)


class AdaptedLinear(Linear):
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


def linear(cfg: ModelConfig, name: str, rngs: nnx.Rngs, use_bias: bool = False) -> Linear:
    """The block's linear layer of that name in `layout.LORA_MODULES`, with its adapter if it has one."""
    widths = cfg.linear_widths()[name]
    if cfg.lora is not None and name in cfg.lora.target_modules:
        return AdaptedLinear(cfg, name, *widths, use_bias=use_bias, **kernel_options(cfg), rngs=rngs)
    return Linear(*widths, use_bias=use_bias, **kernel_options(cfg), rngs=rngs)


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
