"""The clusterings beside k-means against NumPy transcriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.common import clustering
from dataflex_jax.policies.common.clustering import CLUSTERINGS, clustered
from dataflex_jax.policies.common.kmeans import kmeans, spherical_kmeans

KEY = jax.random.key(2)


def points_of(n, offset=0.0):
    return (offset + np.random.default_rng(n).normal(size=(n, 3))).astype(np.float32)


def farthest_first(points, num_clusters, first):
    distances = np.linalg.norm(points[:, None].astype(np.float64) - points, axis=2)
    centers = [first]
    while len(centers) < num_clusters:
        left = [i for i in range(len(points)) if i not in centers]
        centers.append(max(left, key=lambda i: (distances[i, centers].min(), -i)))
    return distances[:, centers].argmin(axis=1)


@pytest.mark.parametrize(("n", "num_clusters"), [(1, 1), (30, 1), (30, 7), (30, 30)])
def test_farthest_first_equals_the_transcription(n, num_clusters):
    points = points_of(n, 1000)
    first = int(jax.random.choice(KEY, n))
    found = clustering.farthest_first(points, num_clusters, KEY)
    np.testing.assert_array_equal(found, farthest_first(points, num_clusters, first))


def test_farthest_first_takes_no_center_twice_and_of_equal_centers_the_first():
    found = clustering.farthest_first(jnp.ones((5, 2)), 4, KEY)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(("n", "num_clusters"), [(1, 1), (60, 1), (60, 4), (60, 5), (60, 60)])
def test_lsh_is_by_the_sides_of_planes_through_the_mean(n, num_clusters):
    points = points_of(n, 100)
    bits = max(1, int(np.ceil(np.log2(num_clusters))))
    planes = np.asarray(jax.random.normal(KEY, (3, bits)))
    sides = [tuple(row) for row in ((points - points.mean(axis=0)) @ planes >= 0).astype(int)[:, ::-1]]
    ranks = {side: rank for rank, side in enumerate(sorted(set(sides)))}
    found = clustering.random_projection_lsh(points, num_clusters, KEY)
    np.testing.assert_array_equal(found, [ranks[side] % num_clusters for side in sides])
    assert len(set(found.tolist())) == min(len(ranks), num_clusters)


def test_a_random_partition_has_sizes_that_differ_by_one_at_most():
    found = np.asarray(clustering.random_partition(points_of(47), 5, KEY))
    np.testing.assert_array_equal(np.sort(np.bincount(found)), [9, 9, 9, 10, 10])
    assert (np.sort(found) != found).any()
    assert (found != clustering.random_partition(points_of(47), 5, jax.random.key(3))).any()


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_each_is_deterministic_and_says_the_distance_from_the_centroid(name):
    points = points_of(47, 10)
    cluster, distance = (np.asarray(each) for each in clustered(name, points, 5, KEY, 3))
    again, _ = clustered(name, points, 5, KEY, 3)
    np.testing.assert_array_equal(cluster, again)
    assert cluster.dtype == np.int32
    assert 0 <= cluster.min() <= cluster.max() < 5
    if name in ("kmeans", "spherical_kmeans"):
        expected = {"kmeans": kmeans, "spherical_kmeans": spherical_kmeans}[name](points, 5, KEY, 3)[1]
    else:
        means = np.stack([points[cluster == k].mean(axis=0, dtype=np.float64) for k in cluster])
        expected = np.linalg.norm(points - means, axis=1)
    np.testing.assert_allclose(distance, expected, atol=1e-5)
