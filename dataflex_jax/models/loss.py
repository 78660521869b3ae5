"""Next-token cross-entropy that holds the logits of one tile of positions at a time.

The full vocabulary stays in one matmul; tiles run along T, so that rows stay split over devices. Where the weights of
the losses are known beforehand, their gradients are computed together with them. Otherwise the forward pass keeps each
position's logsumexp, from which the backward pass recomputes the tile's probabilities. The gradient of the output
weight is accumulated in float32 on each device and exchanged once.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.sharding import (
    BATCH_AXES,
    all_gather,
    constrain,
    divisible_axis,
    gather_weight,
    map_rows,
    program_device,
    reduce_grad,
    rows_are_split,
)

TILE_TOKENS = 2048


class _Axes(NamedTuple):
    """The mesh axes over which the weight's [D, V] is split inside `map_rows`; None: not split."""

    width: str | None = None
    vocab: str | None = None


def cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    *,
    tile_tokens: int = TILE_TOKENS,
    frozen_weight: bool = False,
) -> Float[Array, "B T"]:
    """-log softmax(hidden @ weight)[label], in nats, float32, of every position.

    Args:
        hidden: final hidden states; matmuls run in their dtype and accumulate in float32.
        weight: the output head's weight, in its storage dtype, which is also its gradient's.
        labels: token ids in [0, V).
        tile_tokens: how many tokens of a device's rows have their logits in memory at once.
        frozen_weight: the weight is a constant. Its gradient is then zero, and that of `hidden` is computed together
            with the losses, so that the backward pass does not repeat the logits.
    """
    if frozen_weight:
        return _frozen_cross_entropy(hidden, weight, labels, tile_tokens)
    return _cross_entropy(hidden, weight, labels, tile_tokens)


def weighted_cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    tile_tokens: int = TILE_TOKENS,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """(sum(weights * losses), losses) of `cross_entropy`; only the sum has derivatives.

    The gradients are computed together with the losses, so that the backward pass does not repeat the logits. The
    weights are constants.
    """
    return _weighted_cross_entropy(hidden, weight, labels, weights, tile_tokens)


def label_scores(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    *,
    tile_tokens: int = TILE_TOKENS,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(cross-entropy of every label, as `cross_entropy` has it; whether it is the most likely token).

    Of tokens that are equally likely the one with the least id counts as the most likely. Without a derivative.

    Args:
        hidden: as in `cross_entropy`.
        weight: as in `cross_entropy`.
        labels: as in `cross_entropy`.
        tile_tokens: as in `cross_entropy`.
    """
    return _over_rows(_forward_with_greedy, hidden, weight, labels, tile_tokens)


def next_token_logits(hidden: Float[Array, "B T D"], weight: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    """hidden @ weight, accumulated and returned in float32; both operands have the compute dtype."""
    logits = _matmul("btd,dv->btv", hidden, weight)
    return constrain(logits, BATCH_AXES, None, "tensor")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(hidden, weight, labels, tile_tokens):
    return _cross_entropy_fwd(hidden, weight, labels, tile_tokens)[0]


def _cross_entropy_fwd(hidden, weight, labels, tile_tokens):
    losses, logsumexp = _over_rows(_forward, hidden, weight, labels, tile_tokens)
    return losses, (hidden, weight, labels, logsumexp)


def _cross_entropy_bwd(tile_tokens, residuals, grad):
    hidden, weight, labels, logsumexp = residuals
    rows, axes = P(BATCH_AXES), _Axes()
    if split := rows_are_split(hidden.shape[0]):
        axes = _weight_axes(weight)
    backward = partial(_backward, tile_tokens=tile_tokens, axes=axes)
    if split:

        def backward_and_reduce(*args):
            d_hidden, d_weight = _exchanged(*backward(*args), axes)
            return d_hidden, d_weight.astype(weight.dtype)

        mapped = map_rows(backward_and_reduce, (rows, P(*axes), rows, rows, rows), (rows, P(*axes)))
        return *mapped(hidden, weight, labels, logsumexp, grad), None
    d_hidden, d_weight = backward(hidden, weight, labels, logsumexp, grad)
    return d_hidden, d_weight.astype(weight.dtype), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_cross_entropy(hidden, weight, labels, weights, tile_tokens):
    losses, _ = _cross_entropy_fwd(hidden, weight, labels, tile_tokens)
    return jnp.sum(weights * losses), losses


def _weighted_fwd(hidden, weight, labels, weights, tile_tokens):
    rows, axes = P(BATCH_AXES), _Axes()
    if split := rows_are_split(hidden.shape[0]):
        axes = _weight_axes(weight)

    def with_gradients(*operands):
        losses, d_hidden, d_weight = _forward_with_gradients(*operands, tile_tokens, axes)
        if split:
            d_hidden, d_weight = _exchanged(d_hidden, d_weight, axes)
        return losses, d_hidden, d_weight.astype(weight.dtype)

    if split:
        with_gradients = map_rows(with_gradients, (rows, P(*axes), rows, rows), (rows, rows, P(*axes)))
    losses, *gradients = with_gradients(hidden, weight, labels, weights)
    return (jnp.sum(weights * losses), losses), gradients


def _weighted_bwd(tile_tokens, gradients, upstream):
    d_hidden, d_weight = gradients
    factor, _ = upstream
    return (d_hidden * factor).astype(d_hidden.dtype), (d_weight * factor).astype(d_weight.dtype), None, None


_weighted_cross_entropy.defvjp(_weighted_fwd, _weighted_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _frozen_cross_entropy(hidden, weight, labels, tile_tokens):
    return _cross_entropy_fwd(hidden, weight, labels, tile_tokens)[0]


def _frozen_fwd(hidden, weight, labels, tile_tokens):
    return _over_rows(_forward_with_gradient, hidden, weight, labels, tile_tokens)


def _frozen_bwd(tile_tokens, d_hidden, grad):
    return (d_hidden * grad[..., None]).astype(d_hidden.dtype), None, None


_frozen_cross_entropy.defvjp(_frozen_fwd, _frozen_bwd)


def _over_rows(forward, hidden, weight, labels, tile_tokens):
    """`forward` on each device's own rows; what it returns has the rows of the batch."""
    if not rows_are_split(hidden.shape[0]):
        return forward(hidden, weight, labels, tile_tokens, _Axes())
    rows, axes = P(BATCH_AXES), _weight_axes(weight)
    forward = partial(forward, tile_tokens=tile_tokens, axes=axes)
    return map_rows(forward, (rows, P(*axes), rows), (rows, rows))(hidden, weight, labels)


def _forward(hidden, weight, labels, tile_tokens, axes):
    """(losses, logsumexp), both [B, T]."""
    weight = _compute_weight(weight, hidden.dtype, axes)

    def tile(_, inputs):
        hidden, labels = inputs
        return None, _losses(next_token_logits(hidden, weight), labels, axes)

    tiles = _Tiles(*labels.shape, tile_tokens)
    _, (losses, logsumexp) = jax.lax.scan(tile, None, (tiles.split(hidden), tiles.split(labels)))
    return tiles.join(losses), tiles.join(logsumexp)


def _forward_with_greedy(hidden, weight, labels, tile_tokens, axes):
    """(losses, whether the label is the most likely token), both [B, T]."""
    weight = _compute_weight(weight, hidden.dtype, axes)

    def tile(_, inputs):
        hidden, labels = inputs
        logits = next_token_logits(hidden, weight)
        return None, (_losses(logits, labels, axes)[0], _most_likely(logits, axes) == labels)

    tiles = _Tiles(*labels.shape, tile_tokens)
    _, (losses, greedy) = jax.lax.scan(tile, None, (tiles.split(hidden), tiles.split(labels)))
    return tiles.join(losses), tiles.join(greedy)


def _forward_with_gradient(hidden, weight, labels, tile_tokens, axes):
    """(losses [B, T], their gradients with respect to hidden [B, T, D])."""
    weight = _compute_weight(weight, hidden.dtype, axes)

    def tile(_, inputs):
        hidden, labels = inputs
        logits = next_token_logits(hidden, weight)
        losses, logsumexp = _losses(logits, labels, axes)
        d_logits = _d_logits(logits, labels, logsumexp, axes).astype(hidden.dtype)
        d_hidden = _over_vocab(jax.lax.psum, _matmul("btv,dv->btd", d_logits, weight), axes)
        return None, (losses, d_hidden.astype(hidden.dtype))

    tiles = _Tiles(*labels.shape, tile_tokens)
    _, (losses, d_hidden) = jax.lax.scan(tile, None, (tiles.split(hidden), tiles.split(labels)))
    return tiles.join(losses), tiles.join(d_hidden)


def _forward_with_gradients(hidden, weight, labels, weights, tile_tokens, axes):
    """(losses [B, T], the gradients of sum(weights * losses) as `_backward` has them)."""
    weight = _compute_weight(weight, hidden.dtype, axes)

    def tile(d_weight, inputs):
        hidden, labels, weights = inputs
        logits = next_token_logits(hidden, weight)
        losses, logsumexp = _losses(logits, labels, axes)
        d_weight, d_hidden = _gradients(d_weight, hidden, weight, logits, labels, logsumexp, weights, axes)
        return d_weight, (losses, d_hidden)

    tiles = _Tiles(*labels.shape, tile_tokens)
    inputs = jax.tree.map(tiles.split, (hidden, labels, weights))
    d_weight, (losses, d_hidden) = jax.lax.scan(tile, _no_gradient(weight), inputs)
    return tiles.join(losses), tiles.join(d_hidden), d_weight


def _backward(hidden, weight, labels, logsumexp, grad, tile_tokens, axes):
    """The gradients of hidden [B, T, D], summed over this vocabulary, and of the weight, float32, over these rows."""
    weight = _compute_weight(weight, hidden.dtype, axes)

    def tile(d_weight, inputs):
        hidden, labels, logsumexp, grad = inputs
        logits = next_token_logits(hidden, weight)
        return _gradients(d_weight, hidden, weight, logits, labels, logsumexp, grad, axes)

    tiles = _Tiles(*labels.shape, tile_tokens)
    inputs = jax.tree.map(tiles.split, (hidden, labels, logsumexp, grad))
    d_weight, d_hidden = jax.lax.scan(tile, _no_gradient(weight), inputs)
    return tiles.join(d_hidden), d_weight


def _no_gradient(weight):
    return constrain(jnp.zeros(weight.shape, jnp.float32), None, "tensor")


def _gradients(d_weight, hidden, weight, logits, labels, logsumexp, grad, axes):
    """(`d_weight` with a tile's gradient of the weight, that of its hidden states)."""
    d_logits = _d_logits(logits, labels, logsumexp, axes) * grad[..., None]
    d_logits = constrain(d_logits.astype(hidden.dtype), BATCH_AXES, None, "tensor")
    d_hidden = _matmul("btv,dv->btd", d_logits, weight)
    d_weight += _matmul("btd,btv->dv", hidden, d_logits)
    return d_weight, d_hidden.astype(hidden.dtype)


def _exchanged(d_hidden, d_weight, axes):
    """What `_backward` gives, inside `map_rows`: over the whole vocabulary and over all rows."""
    d_hidden = d_hidden if axes.vocab is None else jax.lax.psum(d_hidden, axes.vocab)
    return d_hidden, reduce_grad(d_weight, 0, axes.width)


def _losses(logits, labels, axes):
    """(losses, logsumexp), both [B, tile]."""
    if program_device().platform != "cpu":
        highest, exp_sum, label_logits = _in_one_pass(logits, _one_hot(labels, logits, axes))
        overall = _over_vocab(jax.lax.pmax, highest, axes)
        sums = jnp.stack([exp_sum * jnp.exp(highest - overall), label_logits])
        exp_sum, label_logits = _over_vocab(jax.lax.psum, sums, axes)
        logsumexp = overall + jnp.log(exp_sum)
        return logsumexp - label_logits, logsumexp
    highest = _over_vocab(jax.lax.pmax, jnp.max(logits, axis=-1), axes)
    # A sum under a mask, because a gather from logits that are split over the vocabulary would collect them.
    label_logits = jnp.sum(jnp.where(_one_hot(labels, logits, axes), logits, 0.0), axis=-1)
    sums = jnp.stack([jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1), label_logits])
    exp_sum, label_logits = _over_vocab(jax.lax.psum, sums, axes)
    logsumexp = highest + jnp.log(exp_sum)
    return logsumexp - label_logits, logsumexp


def _in_one_pass(logits, one_hot):
    """(highest, sum of exp(logits - highest), the label's logit), each [B, tile]."""

    def merged(left, right):
        highest = jnp.maximum(left[0], right[0])
        exp_sum = left[1] * jnp.exp(left[0] - highest) + right[1] * jnp.exp(right[0] - highest)
        return highest, exp_sum, left[2] + right[2]

    operands = (logits, jnp.ones_like(logits), jnp.where(one_hot, logits, 0.0))
    nothing = (np.finfo(np.float32).min, np.float32(0), np.float32(0))
    return jax.lax.reduce(operands, nothing, merged, (logits.ndim - 1,))


def _d_logits(logits, labels, logsumexp, axes):
    """The gradient of each loss with respect to its logits."""
    probabilities = jnp.exp(logits - logsumexp[..., None])
    return jnp.where(_one_hot(labels, logits, axes), probabilities - 1.0, probabilities)


def _weight_axes(weight):
    return _Axes(divisible_axis("fsdp", weight.shape[0]), divisible_axis("tensor", weight.shape[1]))


def _compute_weight(weight, dtype, axes):
    return gather_weight(all_gather(weight.astype(dtype), 0, axes.width), dtype, ("fsdp", "tensor"))


def _matmul(subscripts, x, y):
    # XLA's CPU backend lacks bfloat16 x bfloat16 = float32 where it folds a transpose (tied embeddings) into the dot.
    dtype = jnp.float32 if program_device().platform == "cpu" else x.dtype
    return jnp.einsum(subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _one_hot(labels, logits, axes):
    return labels[..., None] == _vocab(labels.dtype, logits, axes)


def _most_likely(logits, axes):
    highest = _over_vocab(jax.lax.pmax, jnp.max(logits, axis=-1), axes)
    vocab = _vocab(jnp.int32, logits, axes)
    first = jnp.min(jnp.where(logits == highest[..., None], vocab, jnp.iinfo(jnp.int32).max), axis=-1)
    return _over_vocab(jax.lax.pmin, first, axes)


def _vocab(dtype, logits, axes):
    """The token that each logit is of."""
    vocab = jax.lax.broadcasted_iota(dtype, logits.shape, logits.ndim - 1)
    if axes.vocab is not None:
        vocab += jax.lax.axis_index(axes.vocab) * logits.shape[-1]
    return vocab


def _over_vocab(reduce, x, axes):
    return x if axes.vocab is None else reduce(x, axes.vocab)


class _Tiles:
    """[B, T, ...] <-> [number of tiles, B, tile, ...]; the last tile is padded with zeros, which join cuts off."""

    def __init__(self, batch: int, seq_len: int, tile_tokens: int):
        self.batch, self.seq_len = batch, seq_len
        self.number = math.ceil(seq_len / max(1, tile_tokens // batch))
        self.width = math.ceil(seq_len / self.number)

    def split(self, x):
        padding = self.number * self.width - self.seq_len
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(self.batch, self.number, self.width, *x.shape[2:]), 1, 0)

    def join(self, x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(self.batch, self.number * self.width, *x.shape[3:])[:, : self.seq_len]
