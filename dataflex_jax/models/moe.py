"""The mixture of experts: a router sends each token through a few of many SwiGLU experts, and none is dropped.

B rows of T tokens, D channels, E experts of width F, K of them a token.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.dispatch import exchanged, mixed
from dataflex_jax.models.layout import EXPERT_MODULES, FACTORS
from dataflex_jax.models.linear import kernel_options
from dataflex_jax.models.mlp import MLP
from dataflex_jax.models.swiglu import Weights
from dataflex_jax.sharding import BATCH_AXES, constrain, divisible_axis, map_rows, rows_are_split


def _float32_product(
    x: Float[Array, "B T D"], weight: Float[Array, "D E"], *_: Any, **__: Any
) -> Float[Array, "B T E"]:
    return jnp.matmul(x, weight, precision="highest")


class MoE(nnx.Module):
    """Router and experts, in place of a block's `MLP`."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        in_float32 = {"dtype": jnp.dtype("float32"), "dot_general": _float32_product}
        options = kernel_options(cfg)
        self.router = nnx.Linear(cfg.hidden_size, cfg.num_experts, use_bias=False, **(options | in_float32), rngs=rngs)
        self.experts = Experts(cfg, rngs)
        if cfg.family.experts.shared:
            self.shared_expert = MLP(cfg, rngs, width=cfg.shared_expert_intermediate_size)
            self.shared_expert_gate = nnx.Linear(cfg.hidden_size, 1, use_bias=False, **options, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
        """(output, the router's logits in float32)."""
        logits = self.router(x.astype(jnp.float32))
        y = self.experts(x, *route(logits, self.cfg.num_experts_per_tok, self.cfg.norm_topk_prob))
        if self.cfg.family.experts.shared:
            y += nnx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y, logits


class Experts(nnx.Module):
    """The experts' weights, those of all experts in one parameter."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        number, width, hidden = cfg.num_experts, cfg.expert_width, cfg.hidden_size
        draw, dtype = nnx.initializers.normal(cfg.initializer_range), jnp.dtype(cfg.param_dtype)
        self.gate_proj = nnx.Param(draw(rngs.params(), (number, hidden, width), dtype))
        self.up_proj = nnx.Param(draw(rngs.params(), (number, hidden, width), dtype))
        self.down_proj = nnx.Param(draw(rngs.params(), (number, width, hidden), dtype))
        self.scale = None if cfg.lora is None else cfg.lora.scale
        self.adapted = () if cfg.lora is None else tuple(m for m in EXPERT_MODULES if m in cfg.lora.target_modules)
        for name in self.adapted:
            inputs, outputs = cfg.adapter_widths()[name]
            bound = 1 / math.sqrt(inputs)
            shape = number, inputs, cfg.lora.rank
            a = jax.random.uniform(rngs.lora(), shape, dtype, -bound, bound)
            setattr(self, f"{name}_lora_a", nnx.Param(a))
            setattr(self, f"{name}_lora_b", nnx.Param(jnp.zeros((number, cfg.lora.rank, outputs), dtype)))

    def __call__(
        self, x: Float[Array, "B T D"], probabilities: Float[Array, "B T K"], experts: Int[Array, "B T K"]
    ) -> Float[Array, "B T D"]:
        """The sum over each token's experts of probability times output; `probabilities` and `experts` from `route`."""
        weights = self._weights(x.dtype)
        if not rows_are_split(x.shape[0]):
            weights = jax.tree.map(
                lambda weight, spec: constrain(weight, *spec), weights, _specs(weights, None, "tensor")
            )
            return checkpoint_name(_of_rows(mixed, x, probabilities, experts, weights), "projected")
        # Each device sorts the slots of its own rows.
        rows, axis = P(BATCH_AXES), divisible_axis("tensor", weights.gate.shape[2])
        expert_axis = divisible_axis("expert", weights.gate.shape[0])

        def of_device(*operands):
            compute = mixed if expert_axis is None else partial(exchanged, axis=expert_axis)
            y = _of_rows(compute, *operands)
            return y if axis is None else jax.lax.psum(y, axis)

        x = constrain(x, BATCH_AXES, None, None)
        specs = _specs(weights, expert_axis, axis)
        y = map_rows(of_device, (rows, rows, rows, specs), rows)(x, probabilities, experts, weights)
        return checkpoint_name(y, "projected")

    def _weights(self, dtype: jnp.dtype) -> Weights:
        """In the compute dtype; the adapters' scale is in their second factors."""

        def adapter(name):
            if name not in self.adapted:
                return ()
            a, b = (getattr(self, f"{name}_{factor}")[...].astype(dtype) for factor in FACTORS)
            return a, self.scale * b

        kernels = (getattr(self, name)[...].astype(dtype) for name in EXPERT_MODULES)
        return Weights(*kernels, adapters=tuple(map(adapter, EXPERT_MODULES)))


def _specs(weights: Weights, expert: str | None, tensor: str | None) -> Weights:
    """How experts' weights are split over these axes."""

    def specs(inputs, outputs, pair):
        return P(expert, inputs, outputs), (P(expert, inputs, None), P(expert, None, outputs)) if pair else ()

    directions = ((None, tensor), (None, tensor), (tensor, None))
    kernels, adapters = zip(*map(lambda axes, pair: specs(*axes, pair), directions, weights.adapters), strict=True)
    return Weights(*kernels, adapters=adapters)


def _of_rows(compute, x, probabilities, experts, weights):
    flat = (operand.reshape(-1, operand.shape[-1]) for operand in (x, probabilities, experts))
    return compute(*flat, weights).astype(x.dtype).reshape(x.shape)


def route(
    logits: Float[Array, "B T E"], top_k: int, normalized: bool
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """(probabilities, numbers) of the experts that each token goes to.

    Args:
        logits: of the router, float32.
        top_k: how many experts a token goes to.
        normalized: whether the chosen probabilities are divided by their sum.
    """
    probabilities, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if normalized:
        probabilities /= jnp.sum(probabilities, axis=-1, keepdims=True)
    return probabilities, experts


class RouterSums(NamedTuple):
    """Of a layer's router over tokens.

    Attributes:
        slots: how many of each domain's tokens each expert got.
        probabilities: the sums of each expert's probabilities.
        squares: the sum of the squared logsumexp of the logits.
    """

    slots: Float[Array, "*L K E"]
    probabilities: Float[Array, "*L E"]
    squares: Float[Array, "*L"]


def router_sums(
    top_k: int, real: Float[Array, "B T"], domains: Int[Array, " B"] | None = None, number: int = 1
) -> Callable[[Float[Array, "B T E"]], RouterSums]:
    """The function of a router's logits, for `Hooks.of_router`.

    Args:
        top_k: how many experts a token goes to.
        real: 1 where an input is no padding.
        domains: of the rows; None: all are of one.
        number: K, of the domains.
    """
    member = jnp.ones((len(real), 1)) if domains is None else domains[:, None] == jnp.arange(number)

    def sums(logits: Float[Array, "B T E"]) -> RouterSums:
        probabilities = jnp.einsum("bt,bte->e", real, jax.nn.softmax(logits, axis=-1), precision="highest")
        squares = jnp.sum(real * jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        _, experts = jax.lax.top_k(logits, top_k)
        chosen = experts[..., None] == jnp.arange(logits.shape[-1])
        of_rows = jnp.sum(chosen * real[..., None, None], axis=(1, 2))
        # A masked sum, not a matrix product, which GPUs would round to TF32.
        return RouterSums(jnp.sum(member[..., None] * of_rows[:, None], axis=0), probabilities, squares)

    return sums


def loads(logits: Float[Array, "B T E"], top_k: int, real: Float[Array, "B T"]) -> Float[Array, "B E"]:
    """How many of each row's tokens each expert gets; `real` as in `router_sums`."""
    _, experts = jax.lax.top_k(logits, top_k)
    rows = jnp.arange(logits.shape[0])[:, None, None]
    return jnp.zeros((logits.shape[0], logits.shape[2])).at[rows, experts].add(real[:, :, None])


def balancing_loss(sums: RouterSums, tokens: Float[Array, ""]) -> Float[Array, ""]:
    """E sum_e f_e P_e, with f_e the slots of expert e a token and P_e its mean probability, both over the tokens of all
    layers; about K where all experts get as many (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4).

    Args:
        sums: of all layers.
        tokens: how many there are, in each layer.
    """
    layers, _, experts = sums.slots.shape
    total = jnp.maximum(layers * tokens, 1.0)
    share, probability = jnp.sum(sums.slots, axis=(0, 1)) / total, jnp.sum(sums.probabilities, axis=0) / total
    return experts * jnp.sum(share * probability)


def z_loss(sums: RouterSums, tokens: Float[Array, ""]) -> Float[Array, ""]:
    """The mean squared logsumexp of the logits, over the tokens of all layers; arguments as in `balancing_loss`."""
    return jnp.sum(sums.squares) / jnp.maximum(sums.squares.shape[0] * tokens, 1.0)
