"""One vector a row from its last hidden states: what weighters and selectors embed a row by."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dataflex_jax.policies.signals import Embed

_EPS = 1e-8


def _unit(vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), _EPS)


def _weighted_sum(weights: Float[Array, "B T"], hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    # A fused product and sum, not a matrix product, which GPUs would round to TF32.
    return jnp.sum(weights[..., None] * hidden, axis=1)


def position_weighted_mean(hidden: Float[Array, "B T D"], mask: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean of the hidden states in which the j-th real token weighs j: under causal attention later tokens know more.

    Muennighoff 2022, "SGPT: GPT Sentence Embeddings for Semantic Search", arXiv 2202.08904.

    Args:
        hidden: last hidden states, any float dtype.
        mask: 1 where an input is no padding, on whichever side.

    Returns:
        float32, L2-normalised; 0 for a row of padding only.
    """
    mask = mask.astype(jnp.float32)
    places = jnp.cumsum(mask, axis=1) * mask
    weights = places / jnp.maximum(jnp.sum(places, axis=1, keepdims=True), 1.0)
    return _unit(_weighted_sum(weights, hidden))


def mean(
    hidden: Float[Array, "B T D"], mask: Float[Array, "B T"], *, normalised: bool = True, empty: float = 0.0
) -> Float[Array, "B D"]:
    """Mean of the hidden states of the real tokens.

    Args:
        hidden: last hidden states, any float dtype.
        mask: 1 where an input is no padding.
        normalised: whether each vector is L2-normalised.
        empty: the numbers of a row of padding only.

    Returns:
        float32.
    """
    mask = mask.astype(jnp.float32)
    count = jnp.sum(mask, axis=1, keepdims=True)
    pooled = _weighted_sum(mask, hidden) / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, _unit(pooled) if normalised else pooled, empty)


def last_token(
    hidden: Float[Array, "B T D"], mask: Float[Array, "B T"], *, normalised: bool = True, empty: float = 0.0
) -> Float[Array, "B D"]:
    """The hidden state of the last real token, on whichever side the padding is.

    Args:
        hidden: last hidden states, any float dtype.
        mask: 1 where an input is no padding.
        normalised: whether each vector is L2-normalised.
        empty: the numbers of a row of padding only.

    Returns:
        float32.
    """
    real = mask > 0
    last = mask.shape[1] - 1 - jnp.argmax(jnp.flip(real, axis=1), axis=1)
    states = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.where(jnp.any(real, axis=1)[:, None], _unit(states) if normalised else states, empty)


def side_by_side(embeddings: Float[Array, "B L E"], operand: PyTree = None) -> Float[Array, "B D"]:
    """The embeddings of a row's L layers as one of L * E numbers, L2-normalised; 0 where all are.

    Args:
        embeddings: each L2-normalised.
        operand: unused, so that it may be an `Embeddings.then`.
    """
    del operand
    return _unit(embeddings.reshape(embeddings.shape[0], -1))


# By the names that options have; all normalise. Functions of the module, because a sweep is compiled once for each
# function that it applies.
POOLINGS: dict[str, Embed] = {"position_weighted": position_weighted_mean, "mean": mean, "last": last_token}
