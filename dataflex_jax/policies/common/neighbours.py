"""Exact nearest neighbours and kernel densities: tiles of distances and a running best, on the device."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Distances that are held at a time, 32 MiB beside the best so far.
_QUERIES = 512
_POINTS = 16384


class Neighbours(NamedTuple):
    """The nearest points of each query.

    Attributes:
        ids: places of the points, int32, the nearest first; of equal distances the lower place first.
        distances: theirs (L2), float32.
        closest: the distance of each point from the query nearest to it; NaN for points that are nobody's neighbours.
    """

    ids: Int[np.ndarray, "M k"]
    distances: Float[np.ndarray, "M k"]
    closest: Float[np.ndarray, " N"]


class _Best(NamedTuple):
    ids: Int[Array, "m k"]
    squares: Float[Array, "m k"]


def usable(points: Float[np.ndarray, "N d"]) -> Bool[np.ndarray, " N"]:
    """Which points may be neighbours: those that are finite and not zero."""
    squares = np.einsum("nd,nd->n", points, points)
    return np.isfinite(squares) & (squares > 0)


def nearest(queries: Float[np.ndarray, "M d"], points: Float[np.ndarray, "N d"], k: int) -> Neighbours:
    """The `k` nearest points of each query, by all distances in float32.

    Memory on the device does not grow with M or N: both are streamed in tiles.

    Args:
        queries: finite, float32.
        points: float32, at least one of which is usable; those that are not (see `usable`) are nobody's neighbours.
        k: how many, at least 1; all usable ones where there are fewer.
    """
    blocks = list(_search(queries, points, k))
    closest = np.sqrt(np.min([closest for _, _, closest in blocks], axis=0))
    return Neighbours(
        ids=np.concatenate([ids for ids, _, _ in blocks]),
        distances=np.sqrt(np.concatenate([squares for _, squares, _ in blocks])),
        closest=np.where(np.isfinite(closest), closest, np.float32(np.nan)),
    )


def kernel_densities(points: Float[np.ndarray, "N d"], k: int, sigma: float) -> Float[np.ndarray, " N"]:
    """`sum_l max(0, 1 - |x - x_l|^2 / sigma^2)` over the `k` points x_l nearest to each point x, itself among them.

    Args:
        points: usable ones, float32.
        k: how many points are summed over, at least 1.
        sigma: width of the kernel, >= 0; where it is 0 a point counts itself alone.

    Returns:
        float64, at least about 1.
    """
    if sigma == 0:
        return np.ones(len(points))
    squares = (squares.astype(np.float64) for _, squares, _ in _search(points, points, k))
    return np.concatenate([np.maximum(0, 1 - block / sigma**2).sum(axis=1) for block in squares])


def _search(
    queries: Float[np.ndarray, "M d"], points: Float[np.ndarray, "N d"], k: int
) -> Iterator[tuple[Int[np.ndarray, "m k"], Float[np.ndarray, "m k"], Float[np.ndarray, " N"]]]:
    """Of one block of queries after another: its neighbours, their squared distances, and the least of each point."""
    known = usable(points)
    k = min(k, int(known.sum()))
    # Hidden states share a large offset, in which the differences that count would be rounded away.
    offset = np.mean(queries, axis=0, dtype=np.float64).astype(np.float32)
    tile = min(_POINTS, len(points))
    for start in range(0, len(queries), _QUERIES):
        block = jnp.asarray(queries[start : start + _QUERIES] - offset)
        best = _Best(jnp.full((len(block), k), -1, jnp.int32), jnp.full((len(block), k), jnp.inf, jnp.float32))
        closest = []
        for first in range(0, len(points), tile):
            part, inside = points[first : first + tile], known[first : first + tile]
            missing = tile - len(part)
            part, inside = np.pad(part, ((0, missing), (0, 0))), np.pad(inside, (0, missing))
            best, least = _merged(best, block, part, inside, offset, first)
            closest.append(least)
        yield np.asarray(best.ids), np.asarray(best.squares), np.concatenate(closest)[: len(points)]


@functools.partial(jax.jit, donate_argnums=0)
def _merged(
    best: _Best,
    queries: Float[Array, "m d"],
    points: Float[Array, "n d"],
    known: Bool[Array, " n"],
    offset: Float[Array, " d"],
    first: Int[Array, ""],
) -> tuple[_Best, Float[Array, " n"]]:
    """The best of those so far and of one more tile, whose ids begin with `first` and are higher than all before."""
    points = jnp.where(known[:, None], points - offset, 0.0)
    inner = jnp.matmul(queries, points.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(queries**2, axis=1)[:, None] + jnp.sum(points**2, axis=1) - 2 * inner
    squares = jnp.where(known, jnp.maximum(squares, 0.0), jnp.inf)
    ids = jnp.broadcast_to(first + jnp.arange(points.shape[0], dtype=jnp.int32), squares.shape)
    # Of equal values the first is taken, which is the one with the lower id.
    negated, places = jax.lax.top_k(-jnp.concatenate([best.squares, squares], axis=1), best.ids.shape[1])
    ids = jnp.take_along_axis(jnp.concatenate([best.ids, ids], axis=1), places, axis=1)
    return _Best(ids, -negated), jnp.min(squares, axis=0)
