"""k-means by Lloyd's algorithm, on the device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

_TILE = 1024


@functools.partial(jax.jit, static_argnames="num_clusters")
def kmeans(
    points: Float[Array, "n d"], num_clusters: int, key: PRNGKeyArray, iterations: int = 50
) -> tuple[Int[Array, " n"], Float[Array, " n"], Float[Array, "k d"]]:
    """Assigns each point to the nearest of `num_clusters` centroids, which become the means of their points in turn.

    Starts from distinct points at random and stops when no assignment changes. A centroid that loses all its points
    stays where it was. Beside the points it holds one tile of distances to the centroids, never all.

    Args:
        points: finite, float32.
        num_clusters: k <= n.
        key: of the starting points.
        iterations: at most so many times the centroids move.

    Returns:
        Each point's cluster, its distance (L2) from the centroid, and the centroids.
    """
    # Hidden states share a large offset, in which the differences that count would be rounded away.
    offset = jnp.mean(points, axis=0)
    cluster, distance, centroids = _lloyd(points - offset, num_clusters, key, iterations, lambda centroids: centroids)
    return cluster, distance, centroids + offset


@functools.partial(jax.jit, static_argnames=("num_clusters", "reseed"))
def spherical_kmeans(
    points: Float[Array, "n d"], num_clusters: int, key: PRNGKeyArray, iterations: int = 50, *, reseed: bool = False
) -> tuple[Int[Array, " n"], Float[Array, " n"], Float[Array, "k d"]]:
    """`kmeans` by direction: of points and centroids that are scaled to length 1, so that the largest cosine decides.

    Dhillon and Modha 2001, "Concept Decompositions for Large Sparse Text Data Using Clustering".

    Args:
        points: finite, float32; a point that is 0 stays there.
        num_clusters: k <= n.
        key: of the starting points.
        iterations: at most so many times the centroids move.
        reseed: whether centroids that have lost all their points move to those that are the farthest from their own.

    Returns:
        Each point's cluster, the distance (L2) of its direction from the centroid, and the centroids.
    """
    directions = _unit(points)
    offset = jnp.mean(directions, axis=0)
    cluster, distance, centroids = _lloyd(
        directions - offset, num_clusters, key, iterations, lambda means: _unit(means + offset) - offset, reseed
    )
    return cluster, distance, centroids + offset


def _unit(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _lloyd(
    points: Float[Array, "n d"],
    num_clusters: int,
    key: PRNGKeyArray,
    iterations: int,
    settled: Callable,
    reseed: bool = False,
) -> tuple[Int[Array, " n"], Float[Array, " n"], Float[Array, "k d"]]:
    """See `kmeans`; `settled` makes centroids of means of points, `reseed` as for `spherical_kmeans`."""
    start = points[jax.random.choice(key, points.shape[0], (num_clusters,), replace=False)]

    def assign(centroids):
        half_norms = 0.5 * jnp.sum(centroids**2, axis=1)

        def nearest(point):
            inner = jnp.matmul(centroids, point, precision=jax.lax.Precision.HIGHEST)
            cluster = jnp.argmin(half_norms - inner)
            return cluster.astype(jnp.int32), jnp.linalg.norm(point - centroids[cluster])

        return jax.lax.map(nearest, points, batch_size=min(_TILE, points.shape[0]))

    def moving(carry):
        _, _, _, changed, done = carry
        return changed & (done < iterations)

    def move(carry):
        centroids, cluster, distance, _, done = carry
        counts = jnp.bincount(cluster, length=num_clusters)[:, None]
        sums = jax.ops.segment_sum(points, cluster, num_clusters)
        if reseed:
            farthest = points[jnp.argsort(-distance, stable=True)[:num_clusters]]
            centroids = farthest[jnp.cumsum(counts[:, 0] == 0) - 1]
        centroids = jnp.where(counts > 0, settled(sums / jnp.maximum(counts, 1)), centroids)
        after, distance = assign(centroids)
        return centroids, after, distance, jnp.any(after != cluster), done + 1

    centroids, cluster, distance, _, _ = jax.lax.while_loop(moving, move, (start, *assign(start), True, 0))
    return cluster, distance, centroids
