"""How likely given tokens are after given texts, where many texts begin alike.

What texts share is read once, into keys and values that the rest of each text attends to; logits are computed only at
the places that are asked about.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.models.attention import causal_attention
from dataflex_jax.models.decoder import output_weight, run_blocks
from dataflex_jax.models.loss import label_scores
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import BATCH_AXES, constrain


class Prefixes(NamedTuple):
    """What G beginnings of texts leave in the attention of all layers, padded on the right.

    Attributes:
        keys: after the rotary embedding, in the compute dtype.
        values: as projected.
        lengths: tokens of each.
    """

    keys: Float[Array, "L G P K H"]
    values: Float[Array, "L G P K H"]
    lengths: Int[Array, " G"]


class Texts(NamedTuple):
    """B texts, or what comes in them after a prefix, padded on the right, with Q questions each.

    Attributes:
        tokens: what is read.
        prefix: which prefix each text has; unused where there are none.
        places: after which of `tokens` a label is asked about.
        labels: token ids.
    """

    tokens: Int[Array, "B T"]
    prefix: Int[Array, " B"]
    places: Int[Array, "B Q"]
    labels: Int[Array, "B Q"]


class Scores(NamedTuple):
    """What `scored` says of each label.

    Attributes:
        log_probs: float32, in nats.
        greedy: whether it is the most likely token.
    """

    log_probs: Float[Array, "B Q"]
    greedy: Bool[Array, "B Q"]


def read(model: Model, tokens: Int[Array, "G P"], lengths: Int[Array, " G"]) -> Prefixes:
    """Reads the beginnings of texts.

    Args:
        model: on the mesh that is set, if any.
        tokens: padded on the right.
        lengths: how many are read of each.
    """
    cfg = model.config
    shape = (cfg.num_hidden_layers, *tokens.shape, cfg.num_key_value_heads, cfg.head_dim)
    empty = _split(jnp.zeros(shape, jnp.dtype(cfg.dtype)))

    def attend(memory, layer, query, key, value):
        kept = tuple(
            _split(jax.lax.dynamic_update_index_in_dim(buffer, new, layer, 0))
            for buffer, new in zip(memory, (key, value), strict=True)
        )
        return _within(cfg, query, key, value), kept

    positions = jnp.arange(tokens.shape[1])[None]
    _, (keys, values), *_ = run_blocks(model.graphdef, model.whole(), tokens, positions, attend, (empty, empty))
    return Prefixes(keys, values, lengths)


def scored(model: Model, texts: Texts, prefixes: Prefixes | None = None) -> Scores:
    """The log-probability of each label after its place, and whether it is the most likely token.

    Args:
        model: on the mesh that is set, if any.
        texts: whole ones, or the rest of those that begin with `prefixes`.
        prefixes: from `read`; None: the texts are whole.
    """
    cfg, params = model.config, model.whole()
    places = jnp.arange(texts.tokens.shape[1])[None]
    if prefixes is None:
        positions, attend = places, functools.partial(_alone, cfg)
    else:
        before = prefixes.lengths[texts.prefix]
        positions = before[:, None] + places
        attend = functools.partial(_after, cfg.sliding_window, prefixes, texts.prefix, positions)
    hidden, *_ = run_blocks(model.graphdef, params, texts.tokens, positions, attend, None)
    asked = jnp.take_along_axis(hidden, texts.places[..., None], axis=1)
    losses, greedy = label_scores(constrain(asked, BATCH_AXES, None, None), output_weight(params), texts.labels)
    return Scores(-losses, greedy)


def _within(cfg, query, key, value):
    return causal_attention(query, key, value, sliding_window=cfg.sliding_window, implementation=cfg.attention)


def _alone(cfg, memory, layer, query, key, value):
    del layer
    return _within(cfg, query, key, value), memory


def _after(window, prefixes, prefix, positions, memory, layer, query, key, value):
    """Attention of texts over their prefixes and, causally, over themselves; softmax in float32."""
    keys, values = (jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False)[prefix] for buffer in prefixes[:2])
    slots = jnp.broadcast_to(jnp.arange(keys.shape[1])[None], keys.shape[:2])
    held = slots < prefixes.lengths[prefix][:, None]
    at = jnp.concatenate([slots, positions], axis=1)[:, None, :]
    ahead = positions[:, :, None] - at
    seen = (ahead >= 0) & jnp.concatenate([held, jnp.ones_like(positions, bool)], axis=1)[:, None, :]
    if window is not None:
        seen &= ahead < window
    attended = jax.nn.dot_product_attention(
        query,
        jnp.concatenate([keys, key], axis=1),
        jnp.concatenate([values, value], axis=1),
        mask=seen[:, None],
        implementation="xla",
    )
    return attended, memory


def _split(buffer):
    return constrain(buffer, None, BATCH_AXES, None, "tensor", None)
