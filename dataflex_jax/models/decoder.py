"""One decoder for all of `families`, as pure functions of a pytree of parameters.

`create` splits a Flax NNX module once into a static graph definition and a nested dict of arrays. Kernels are
[in, out]. Everything under "layers" has a leading layer axis, and is scanned or not, see `depth`; one layer's gathered
weights are alive at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dataflex_jax.models import depth
from dataflex_jax.models.attention import causal_attention
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.embed import embed
from dataflex_jax.models.layout import gather_weights
from dataflex_jax.models.linear import Product, kernel_options, linear, of_one_input, set_dropout, set_product
from dataflex_jax.models.loss import TILE_TOKENS, cross_entropy, weighted_cross_entropy
from dataflex_jax.models.mlp import MLP
from dataflex_jax.models.moe import MoE
from dataflex_jax.models.norm import RMSNorm
from dataflex_jax.models.remat import remat_policy
from dataflex_jax.models.rope import apply_rope, rope_tables
from dataflex_jax.sharding import BATCH_AXES, constrain

Params = PyTree[Array]
# (memory, layer index, rotated queries, rotated keys, values) -> (attended, memory); see `run_blocks`.
Attend = Callable[..., tuple[Float[Array, "B T N H"], PyTree]]


class Hooks(NamedTuple):
    """What a caller has done inside the model; nothing by default.

    Attributes:
        dropout_keys: [B], one a row, for the dropout of adapters; None: no dropout.
        block_transform: called in the scan's body with one layer's parameters (kernels in the compute dtype and
            gathered, the rest as stored) and the layer's index; returns the parameters that the layer uses.
        product: computes every x @ weight of the blocks' linear layers, see `linear.set_product`; None: as usual.
        tile_tokens: how many tokens of a device's rows have their logits in memory at once.
        written_out: the layers are not a loop; for train steps, as they are compiled once and run long. See `depth`.
        all_trained: all parameters have a gradient; of layers that are written out see `depth.written_out`.
        frozen_head: the output weight is a constant to derivatives, which makes the others cheaper.
        token_weights: factors of the losses in what is minimised, where they are known beforehand: `Decoded.weighted`
            has derivatives then, which are cheaper, and the losses have none.
        of_router: what is kept of the logits of each layer's router: `aux["of_router"]`, as `of_layer`'s. Nothing of
            the layers of a dense model, which have none.
        of_layer: what is kept of the hidden states after each layer, before the final norm: `aux["of_layer"]`, stacked
            over the layers. Computed in the scan's body, so that one layer's hidden states are alive at a time.
    """

    dropout_keys: PRNGKeyArray | None = None
    block_transform: Callable[[Params, Int[Array, ""]], Params] | None = None
    product: Product | None = None
    tile_tokens: int = TILE_TOKENS
    written_out: bool = False
    all_trained: bool = False
    frozen_head: bool = False
    token_weights: Float[Array, "B T"] | None = None
    of_router: Callable[[Float[Array, "B T E"]], PyTree] | None = None
    of_layer: Callable[[Float[Array, "B T D"]], PyTree] | None = None


NO_HOOKS = Hooks()


class Decoded(NamedTuple):
    """What a forward pass over next tokens gives.

    Attributes:
        losses: cross-entropy in nats, float32.
        hidden: the last hidden states, in the compute dtype.
        aux: what the blocks say beside their outputs, stacked over the layers.
        weighted: the sum of the losses times `Hooks.token_weights`; None without.
    """

    losses: Float[Array, "B T"]
    hidden: Float[Array, "B T D"]
    aux: PyTree
    weighted: Float[Array, ""] | None = None


class States(NamedTuple):
    """What `run_blocks` gives.

    Attributes:
        hidden: the last hidden states, after the final norm, in the compute dtype.
        memory: that the last layer left.
        aux: what the blocks say beside their outputs, stacked over the layers.
        head: the output head's weight, as `output_weight` has it. Where this one is used, devices exchange its gradient
            beside the blocks' backward pass.
    """

    hidden: Float[Array, "B T D"]
    memory: PyTree
    aux: PyTree
    head: Float[Array, "D V"]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.q_proj = linear(cfg, "q_proj", rngs, cfg.attention_bias)
        self.k_proj = linear(cfg, "k_proj", rngs, cfg.attention_bias)
        self.v_proj = linear(cfg, "v_proj", rngs, cfg.attention_bias)
        self.o_proj = linear(cfg, "o_proj", rngs, cfg.output_bias)
        if cfg.qk_norm:
            query, key = cfg.qk_norm_widths()
            self.q_norm = RMSNorm(cfg, query, rngs)
            self.k_norm = RMSNorm(cfg, key, rngs)

    def __call__(self, x, rope, attend):
        """[B, T, D] -> ([B, T, D], memory); `rope` from `rope_tables`, `attend` of queries, keys and values."""
        cfg = self.cfg

        def heads(projected, name):
            split = projected.reshape(*x.shape[:2], -1, cfg.head_dim)
            return checkpoint_name(constrain(split, BATCH_AXES, None, "tensor", None), name)

        query, key, value = of_one_input(x, (self.q_proj, self.k_proj, self.v_proj))
        value = heads(value, "v")
        if cfg.family.qk_norm_over_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = heads(query, "q"), heads(key, "k")
        if cfg.qk_norm and not cfg.family.qk_norm_over_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        attended, memory = attend(apply_rope(query, *rope), apply_rope(key, *rope), value)
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), memory


class Block(nnx.Module):
    """Attention and MLP or mixture of experts, each after an RMSNorm and added to the residual stream."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg, cfg.hidden_size, rngs)
        self.attention = Attention(cfg, rngs)
        self.post_attention_layernorm = RMSNorm(cfg, cfg.hidden_size, rngs)
        experts = cfg.family.experts
        self.mlp_name = "mlp" if experts is None else experts.block
        setattr(self, self.mlp_name, MLP(cfg, rngs) if experts is None else MoE(cfg, rngs))

    def __call__(self, x, rope, attend):
        """[B, T, D] -> ([B, T, D], memory, aux); `rope` from `rope_tables`, `attend` of queries, keys and values.

        `aux` is a dict of arrays: what the block says beside its output, "router_logits" [B, T, E] if it has a router.
        """
        attended, memory = self.attention(self.input_layernorm(x), rope, attend)
        x = checkpoint_name(constrain(x + attended, BATCH_AXES, None, None), "projected")
        mlp, normed, aux = getattr(self, self.mlp_name), self.post_attention_layernorm(x), {}
        if isinstance(mlp, MoE):
            y, aux["router_logits"] = mlp(normed)
        else:
            y = mlp(normed)
        return constrain(x + y, BATCH_AXES, None, None), memory, aux


class Decoder(nnx.Module):
    """The parameters of the whole model; `hidden_states` runs them."""

    def __init__(self, cfg: ModelConfig, key: Array):
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.cfg = cfg
        self.embed_tokens = nnx.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            param_dtype=jnp.dtype(cfg.param_dtype),
            embedding_init=nnx.initializers.normal(cfg.initializer_range),
            rngs=nnx.Rngs(embed_key),
        )
        layer_keys = jax.random.split(layers_key, cfg.num_hidden_layers)
        # A stream of their own, so that the other parameters are the same with adapters and without.
        lora_keys = jax.random.split(jax.random.fold_in(layers_key, cfg.num_hidden_layers), cfg.num_hidden_layers)
        self.layers = nnx.vmap(lambda key, lora_key: Block(cfg, nnx.Rngs(key, lora=lora_key)))(layer_keys, lora_keys)
        self.norm = RMSNorm(cfg, cfg.hidden_size, nnx.Rngs(head_key))
        if not cfg.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                cfg.hidden_size, cfg.vocab_size, use_bias=False, **kernel_options(cfg), rngs=nnx.Rngs(head_key)
            )


def create(cfg: ModelConfig, key: Array) -> tuple[nnx.GraphDef, Params]:
    """A model with random weights, as Hugging Face draws them: normal(initializer_range), biases 0, norms 1.

    May run under `jax.eval_shape` (shapes only) and `jax.jit` with out_shardings (each device draws its part); the
    values depend on `key` alone.

    Returns:
        (graphdef, params): a static, hashable description, and a nested dict of arrays in cfg.param_dtype whose paths
        read like "layers/attention/q_proj/kernel".
    """
    graphdef, state = nnx.split(Decoder(cfg, key))
    return graphdef, nnx.to_pure_dict(state)


def hidden_states(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BxT: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    most_segments: int | None = None,
    hooks: Hooks = NO_HOOKS,
) -> tuple[Float[Array, "B T D"], PyTree]:
    """(the last hidden states, after the final norm, in the compute dtype; what the blocks say beside them).

    Args:
        graphdef: from `create`.
        params: from `create`.
        tokens_BxT: token ids.
        positions: of each token in its text, for the rotary embeddings; None: 0 to T-1. Only their differences matter,
            so packed segments need none of their own. The causal mask and the sliding window go by place in the row.
        segment_ids: tokens attend only within equal ids, which stand side by side; None: one segment a row.
        most_segments: how many different ids a row has at most, where that is known; see `causal_attention`.
        hooks: what the caller has done inside.
    """
    states = _causal_states(graphdef, params, tokens_BxT, positions, segment_ids, most_segments, hooks)
    return states.hidden, states.aux


def _causal_states(graphdef, params, tokens_BxT, positions, segment_ids, most_segments, hooks) -> States:
    cfg = nnx.merge(graphdef, params).cfg
    if positions is None:
        positions = jnp.arange(tokens_BxT.shape[1])[None]

    def attend(memory, _, query, key, value):
        attended = causal_attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            most_segments=most_segments,
            sliding_window=cfg.sliding_window,
            implementation=cfg.attention,
        )
        return attended, memory

    return run_blocks(graphdef, params, tokens_BxT, positions, attend, None, hooks)


def run_blocks(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BxT: Int[Array, "B T"],
    positions: Int[Array, "#B T"],
    attend: Attend,
    memory: PyTree,
    hooks: Hooks = NO_HOOKS,
    layers: Sequence[Params] | None = None,
) -> States:
    """The last hidden states as in `hidden_states`, with any attention, which may keep a memory across layers.

    Args:
        graphdef: from `create`.
        params: from `create`.
        tokens_BxT: token ids.
        positions: of each token in its text.
        attend: called with the memory, the layer's index, the rotated queries [B, T, N, H] and keys [B, T, K, H] and
            the values [B, T, K, H]; returns what the queries attended to [B, T, N, H] and the memory for the next
            layer.
        memory: what the first layer finds, such as a cache of keys and values; updated in place where XLA can.
        hooks: as in `hidden_states`.
        layers: the layers' parameters one by one, to be used in place of params["layers"]. They are not scanned: where
            there are few tokens, the copy of a layer's weights out of all layers' would cost more than their products.
    """
    model = nnx.merge(graphdef, params)
    cfg, dtype = model.cfg, jnp.dtype(model.cfg.dtype)
    block_graphdef = nnx.graphdef(model.layers)
    rope = rope_tables(cfg, positions)

    def block(carry, layer):
        x, memory = carry
        index, weights = layer
        weights = gather_weights(weights, dtype, "layers")
        if hooks.block_transform is not None:
            weights = hooks.block_transform(weights, index)
        module = nnx.merge(block_graphdef, weights)
        set_dropout(module, hooks.dropout_keys, index)
        if hooks.product is not None:
            set_product(module, hooks.product, index)
        x, memory, said = module(x, rope, partial(attend, memory, index))
        aux = {}
        if hooks.of_router is not None and "router_logits" in said:
            aux["of_router"] = hooks.of_router(said["router_logits"])
        if hooks.of_layer is not None:
            aux["of_layer"] = hooks.of_layer(x)
        return (x, memory), aux

    x = constrain(embed(params["embed_tokens"]["embedding"], tokens_BxT, dtype), BATCH_AXES, None, None)
    carry, policy, head = (x, memory), remat_policy(cfg.remat, dtype), output_weight(params)
    if layers is not None:
        said = []
        for layer in enumerate(layers):
            carry, aux = block(carry, layer)
            said.append(aux)
        aux = depth.stacked(said)
    elif not hooks.written_out:
        carry, aux = depth.scanned(block, carry, params["layers"], policy)
    else:
        mlp = (cfg.mixture or "mlp") if hooks.all_trained else None
        carry, aux, head = depth.written_out(block, carry, params["layers"], head, policy, dtype, mlp=mlp)
    x, memory = carry
    return States(model.norm(x), memory, aux, head)


def output_weight(params: Params) -> Float[Array, "D V"]:
    """The output head's weight, in its storage dtype; with tied embeddings the transposed table."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed_tokens"]["embedding"].T


def token_losses(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens_BxT1: Int[Array, "B T+1"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    most_segments: int | None = None,
    hooks: Hooks = NO_HOOKS,
) -> Decoded:
    """Cross-entropy of every next token, and what predicted it.

    Args:
        graphdef: from `create`.
        params: from `create`.
        tokens_BxT1: token ids; the first T are read, the last T are predicted.
        positions: as in `hidden_states`, of the T tokens that are read.
        segment_ids: as in `hidden_states`, of the T tokens that are read. The loss across a segment's end is computed
            as any other: mask it where it should not count.
        most_segments: as in `hidden_states`.
        hooks: what the caller has done inside.
    """
    inputs, labels = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
    hidden, _, aux, weight = _causal_states(graphdef, params, inputs, positions, segment_ids, most_segments, hooks)
    if hooks.token_weights is not None and not hooks.frozen_head:
        weighted, losses = weighted_cross_entropy(
            hidden, weight, labels, hooks.token_weights, tile_tokens=hooks.tile_tokens
        )
        return Decoded(losses, hidden, aux, weighted)
    losses = cross_entropy(hidden, weight, labels, tile_tokens=hooks.tile_tokens, frozen_weight=hooks.frozen_head)
    if hooks.token_weights is None:
        return Decoded(losses, hidden, aux)
    return Decoded(jax.lax.stop_gradient(losses), hidden, aux, jnp.sum(hooks.token_weights * losses))
