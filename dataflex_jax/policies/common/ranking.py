"""The best of the candidates by score, and random draws of candidates, both on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dataflex_jax.policies.base import Choice


def top(scores: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    """The places of the `num` highest scores, the highest first; ties in incoming order, NaNs after everything."""
    # Sorting the negated scores puts NaNs last, which a descending sort would put first.
    return jnp.argsort(-scores, stable=True)[:num]


def best(scores: Float[Array, " n"], num: int) -> Choice:
    """The `num` candidates with the highest scores, ties in incoming order."""
    ids = top(scores, num)
    return Choice(ids=ids, scores=scores[ids], all_scores=scores)


def drawn(log_weights: Float[Array, " n"], key: PRNGKeyArray, num: int) -> Int[Array, " num"]:
    """Draws `num` distinct candidates, each next one in proportion to its weight among those left.

    By Gumbel top-k, which has the distribution of sequential draws (Kool et al. 2019, arXiv 1903.06059).
    """
    # The default mode has 24 random bits, too few for the best of millions.
    return top(log_weights + jax.random.gumbel(key, log_weights.shape, jnp.float32, mode="high"), num)


def draw(
    stratum: Int[Array, " n"],
    log_weights: Float[Array, " S"],
    key: PRNGKeyArray,
    num: int,
    *,
    replacement: bool = False,
) -> Choice:
    """Draws `num` candidates, each with a probability proportional to the weight of its stratum.

    Without replacement as `drawn`. With replacement a stratum is drawn by its mass and then one of its members, which
    is exact for pools of any size, where float32 cumulative sums over candidates would not be.

    Args:
        stratum: of each candidate, in [0, S).
        log_weights: logarithm of the weight of each stratum's members; -inf: never drawn while there are others.
        key: of the draw.
        num: how many; without replacement at most n.
        replacement: whether a candidate may be drawn several times.

    Returns:
        The candidates in the order drawn; scores are the probabilities of a first draw.
    """
    if replacement:
        stratum_key, member_key = jax.random.split(key)
        counts = jnp.bincount(stratum, length=log_weights.shape[0])
        starts = jnp.cumsum(counts) - counts
        of = jax.random.categorical(stratum_key, jnp.log(counts) + log_weights, shape=(num,))
        members = jax.random.randint(member_key, (num,), 0, counts[of])
        ids = jnp.argsort(stratum, stable=True)[starts[of] + members]
    else:
        ids = drawn(log_weights[stratum], key, num)
    p = probabilities(stratum, log_weights)
    return Choice(ids=ids, scores=p[ids], all_scores=p)


def sample(
    p: Float[Array, " n"], key: PRNGKeyArray, num: int, *, then: Float[Array, " n"], replacement: bool = False
) -> Choice:
    """Draws `num` candidates as `draw` does, each by a probability of its own.

    Args:
        p: of each candidate, up to a factor; 0: only drawn where all others are taken.
        key: of the draw.
        num: how many; without replacement at most n.
        then: by which candidates with p = 0 follow, the lowest first.
        replacement: whether a candidate may be drawn several times; where all p are 0 all are equal.

    Returns:
        The candidates in the order drawn; scores are p.
    """
    if replacement:
        coarse, fine = jax.random.uniform(key, (2, num))
        # In float32 the sums over many candidates would lose the unlikely ones, and so would 23 random bits.
        with jax.enable_x64(True):
            ends = jnp.cumsum(jnp.where(jnp.any(p > 0), p, 1.0).astype(jnp.float64))
            points = (coarse.astype(jnp.float64) + fine.astype(jnp.float64) * 2.0**-23) * ends[-1]
            places = jnp.searchsorted(ends, points, side="right")
            ids = jnp.minimum(places, p.shape[0] - 1).astype(jnp.int32)
    else:
        gumbel = jax.random.gumbel(key, p.shape, jnp.float32, mode="high")
        ids = jnp.lexsort((then, -(jnp.log(p) + gumbel)))[:num]
    return Choice(ids=ids, scores=p[ids], all_scores=p)


def probabilities(stratum: Int[Array, " n"], log_weights: Float[Array, " S"]) -> Float[Array, " n"]:
    """The probability of each candidate in a first draw; zeros where no candidate may be drawn."""
    weights = jnp.exp(log_weights - jnp.max(log_weights))[stratum]
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
