"""Inside clusters: how dense each one is, and its points in the order in which the first ones stand for all of it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# So many points are on the device at a time, or one cluster.
_POINTS = 8192
# The kernels between all points of a cluster are kept, 64 MiB, up to this size.
_LARGEST = 4096
_TILE = 512


class Inside(NamedTuple):
    """Of clusters of points, with the kernel `k(u, v) = exp(-|u - v|^2)`.

    Attributes:
        density: float32, the mean kernel of two different points of each cluster; 1 where there are not two.
        place: int32, of each point among those of its cluster, from 0: each next one is the one with which the points
            so far have the least squared maximum mean discrepancy from the cluster; of equal ones the first.
    """

    density: Float[np.ndarray, " K"]
    place: Int[np.ndarray, " n"]


def inside_clusters(points: Float[np.ndarray, "n d"], cluster: Int[np.ndarray, " n"], num_clusters: int) -> Inside:
    """See `Inside`; of a cluster of m points in time m^2 d, on one device.

    Args:
        points: of length 1, float32.
        cluster: of each, in [0, num_clusters).
        num_clusters: K; some may be empty.
    """
    sizes = np.bincount(cluster, minlength=num_clusters)
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(sizes)[:-1])
    density, place = np.ones(num_clusters, np.float32), np.zeros(len(points), np.int32)
    # Padded to powers of 2, so that few shapes are compiled.
    padded = np.where(sizes > 1, 2 ** np.ceil(np.log2(np.maximum(sizes, 2))).astype(int), 0)
    for size in np.unique(padded[padded > 0]).tolist():
        of_size, at_once = np.flatnonzero(padded == size), max(1, _POINTS // size)
        for start in range(0, len(of_size), at_once):
            some = of_size[start : start + at_once]
            ids = np.full((at_once, size), -1)
            for row, number in enumerate(some):
                ids[row, : sizes[number]] = members[number]
            found = _inside(points[ids], ids >= 0, whole=size <= _LARGEST)
            densities, places = (np.asarray(part) for part in found)
            density[some] = densities[: len(some)]
            place[ids[ids >= 0]] = places[ids >= 0]
    return Inside(density, place)


@functools.partial(jax.jit, static_argnames="whole")
def _inside(
    points: Float[Array, "b m d"], real: Bool[Array, "b m"], *, whole: bool
) -> tuple[Float[Array, " b"], Int[Array, "b m"]]:
    """Of b clusters; `whole`: all kernels of one are in memory, otherwise those of a point are computed anew."""

    def one(points: Float[Array, "m d"], real: Bool[Array, " m"]) -> tuple[Float[Array, ""], Int[Array, " m"]]:
        count, ids = jnp.sum(real), jnp.arange(points.shape[0])

        def kernels(some: Int[Array, "*s"]) -> Float[Array, "*s m"]:
            inner = jnp.matmul(points[some], points.T, precision=jax.lax.Precision.HIGHEST)
            # Of a point with itself without rounding, so that neither of two comes before the other by that.
            kernel = jnp.where(some[..., None] == ids, 1.0, jnp.exp(-jnp.maximum(2 - 2 * inner, 0.0)))
            return jnp.where(real, kernel, 0.0)

        kept = kernels(ids) if whole else None
        sums = jnp.sum(kept, axis=1) if whole else _sums(kernels, ids)
        pairs = jnp.maximum(count * (count - 1), 1)
        density = jnp.where(count > 1, (jnp.sum(jnp.where(real, sums, 0.0)) - count) / pairs, 1.0)

        def take(number: Int[Array, ""], carry: tuple[Float[Array, " m"], Int[Array, " m"]]):
            to_taken, place = carry
            # What of the discrepancy depends on the next point, up to a factor.
            excess = to_taken / (number + 1) - sums / count
            pick = jnp.argmin(jnp.where(real & (place < 0), excess, jnp.inf))
            place = jnp.where(number < count, place.at[pick].set(number), place)
            return to_taken + (kept[pick] if whole else kernels(pick)), place

        start = jnp.zeros_like(sums), jnp.full(real.shape, -1, jnp.int32)
        return density, jax.lax.fori_loop(0, real.shape[0], take, start)[1]

    return jax.vmap(one)(points, real)


def _sums(kernels: Callable, ids: Int[Array, " m"]) -> Float[Array, " m"]:
    return jax.lax.map(lambda number: jnp.sum(kernels(number)), ids, batch_size=_TILE)
