"""Ways to make about k clusters of points, by name."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dataflex_jax.policies.common.kmeans import kmeans, spherical_kmeans

_MOST_BITS = 30


@functools.partial(jax.jit, static_argnames="num_clusters")
def farthest_first(points: Float[Array, "n d"], num_clusters: int, key: PRNGKeyArray) -> Int[Array, " n"]:
    """The nearest to each point of `num_clusters` centers, each the point farthest from all before it, the first drawn.

    Gonzalez 1985, "Clustering to Minimize the Maximum Intercluster Distance". Of equally far points the first is taken,
    none twice; of equally near centers the first counts. Looks at all points once for each center.

    Args:
        points: finite, float32.
        num_clusters: k <= n.
        key: of the first center.
    """
    points = points - jnp.mean(points, axis=0)
    n = points.shape[0]

    def add_center(number, carry):
        center, nearest, cluster, is_center = carry
        squares = jnp.sum((points - points[center]) ** 2, axis=1)
        cluster = jnp.where(squares < nearest, number, cluster)
        nearest = jnp.minimum(squares, nearest)
        is_center = is_center.at[center].set(True)
        return jnp.argmax(jnp.where(is_center, -jnp.inf, nearest)), nearest, cluster, is_center

    first = jax.random.choice(key, n)
    nothing = (jnp.full(n, jnp.inf, jnp.float32), jnp.zeros(n, jnp.int32), jnp.zeros(n, bool))
    return jax.lax.fori_loop(0, num_clusters, add_center, (first, *nothing))[2]


def random_projection_lsh(points: Float[Array, "n d"], num_clusters: int, key: PRNGKeyArray) -> Int[np.ndarray, " n"]:
    """On which side of ceil(log2(num_clusters)) random planes through the points' mean a point lies, as a number.

    Charikar 2002, "Similarity Estimation Techniques from Rounding Algorithms". The combinations of sides that occur are
    numbered, modulo `num_clusters`.

    Args:
        points: finite, float32.
        num_clusters: at most so many clusters are made.
        key: of the planes.
    """
    bits = min(max(1, math.ceil(math.log2(num_clusters))), _MOST_BITS)
    planes = jax.random.normal(key, (points.shape[1], bits))
    # Hidden states share a large offset: planes through the origin would have nearly all of them on one side.
    sides = jnp.matmul(points - jnp.mean(points, axis=0), planes, precision=jax.lax.Precision.HIGHEST) >= 0
    _, buckets = np.unique(np.asarray(sides) @ (1 << np.arange(bits)), return_inverse=True)
    return (buckets % num_clusters).astype(np.int32)


def random_partition(points: Float[Array, "n d"], num_clusters: int, key: PRNGKeyArray) -> Int[Array, " n"]:
    """Clusters drawn at random whose sizes differ by 1 at most."""
    n = points.shape[0]
    return jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32) % num_clusters)


@functools.partial(jax.jit, static_argnames="num_clusters")
def distances_from_means(
    points: Float[Array, "n d"], cluster: Int[Array, " n"], num_clusters: int
) -> Float[Array, " n"]:
    """The distance (L2) of each point from the mean of its cluster."""
    points = points - jnp.mean(points, axis=0)
    counts = jnp.bincount(cluster, length=num_clusters)[:, None]
    means = jax.ops.segment_sum(points, cluster, num_clusters) / jnp.maximum(counts, 1)
    return jnp.linalg.norm(points - means[cluster], axis=1)


_MOVING = {"kmeans": kmeans, "spherical_kmeans": spherical_kmeans}
_FIXED: dict[str, Callable] = {
    "farthest_first": farthest_first,
    "random_projection_lsh": random_projection_lsh,
    "random_partition": random_partition,
}
CLUSTERINGS = (*_MOVING, *_FIXED)


def clustered(
    name: str, points: Float[Array, "n d"], num_clusters: int, key: PRNGKeyArray, iterations: int
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Each point's cluster, in [0, num_clusters), and its distance (L2) from the centroid.

    The centroid is k-means' own, and with the other clusterings the mean of the cluster.

    Args:
        name: one of `CLUSTERINGS`.
        points: finite, float32.
        num_clusters: at most n.
        key: of whatever is drawn.
        iterations: of k-means at most.
    """
    if name in _MOVING:
        cluster, distance, _ = _MOVING[name](points, num_clusters, key, iterations)
        return cluster, distance
    cluster = jnp.asarray(_FIXED[name](points, num_clusters, key))
    return cluster, distances_from_means(points, cluster, num_clusters)
