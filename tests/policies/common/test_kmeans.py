"""k-means against a NumPy transcription of Lloyd's algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.common.kmeans import kmeans, spherical_kmeans


def lloyd(points, start, iterations):
    """Assignment and centroids in float64, one point at a time."""
    centroids = points[start].astype(np.float64)
    assignment = np.full(len(points), -1)
    for _ in range(iterations + 1):
        after = np.array([np.argmin([np.sum((p - c) ** 2) for c in centroids]) for p in points])
        stable, assignment, last = (after == assignment).all(), after, centroids.copy()
        if stable:
            break
        for k in range(len(centroids)):
            if (assignment == k).any():
                centroids[k] = points[assignment == k].mean(axis=0)
    return assignment, last


@pytest.mark.parametrize("iterations", [1, 3, 50])
@pytest.mark.parametrize(("n", "num_clusters"), [(1, 1), (30, 4), (30, 30), (1500, 5)])
def test_kmeans_equals_lloyds_algorithm(n, num_clusters, iterations):
    points = np.random.default_rng(n).normal(1000, 1, (n, 3)).astype(np.float32)
    key = jax.random.key(1)
    if n == 1500:
        points, iterations = points + 20 * (np.arange(n) % num_clusters)[:, None], min(iterations, 3)
    cluster, distance, centroids = kmeans(points, num_clusters, key, iterations)
    start = jax.random.choice(key, n, (num_clusters,), replace=False)
    expected, at = lloyd(points, np.asarray(start), iterations)
    np.testing.assert_array_equal(cluster, expected)
    np.testing.assert_allclose(centroids, at, rtol=1e-6)
    np.testing.assert_allclose(distance, np.linalg.norm(points - at[expected], axis=1), atol=2e-3)


def spherical(points, start, iterations):
    """Assignment by the largest cosine, and unit centroids, in float64."""
    units = points.astype(np.float64) / np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    centroids, assignment = units[start], None
    for _ in range(iterations + 1):
        after, last = (units @ centroids.T).argmax(axis=1), centroids.copy()
        if assignment is not None and (after == assignment).all():
            break
        assignment = after
        for k in set(assignment.tolist()):
            mean = units[assignment == k].mean(axis=0)
            centroids[k] = mean / np.linalg.norm(mean)
    return assignment, last


@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("iterations", [1, 50])
def test_spherical_kmeans_goes_by_cosines_alone(iterations, offset):
    rng, key = np.random.default_rng(0), jax.random.key(1)
    points = (rng.gamma(1, 1, (60, 1)) * (offset + rng.normal(size=(60, 3)))).astype(np.float32)
    cluster, distance, centroids = spherical_kmeans(points, 4, key, iterations)
    start = np.asarray(jax.random.choice(key, 60, (4,), replace=False))
    expected, at = spherical(points, start, iterations)
    np.testing.assert_array_equal(cluster, expected)
    np.testing.assert_allclose(centroids, at, atol=1e-6)
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(distance, np.linalg.norm(units - at[expected], axis=1), atol=1e-6)


def test_kmeans_of_repeated_points_leaves_clusters_empty():
    cluster, distance, centroids = kmeans(jnp.ones((6, 2)), 3, jax.random.key(0))
    np.testing.assert_array_equal(cluster, 0)
    np.testing.assert_array_equal(distance, 0)
    assert np.isfinite(np.asarray(centroids)).all()


def test_empty_clusters_are_seeded_with_the_farthest_points():
    """Two of three centroids begin on equal points, of which one is left without any; it goes to the far point."""
    key = jax.random.key(0)
    start = np.asarray(jax.random.choice(key, 12, (3,), replace=False))
    rng = np.random.default_rng(0)
    points = np.array([0, 0, 1]) + 0.05 * rng.normal(size=(12, 3))
    points[start] = [0, 0, 1]
    far = np.setdiff1d(np.arange(12), start)[4]
    points[far] = [1, 0, 0]
    points = jnp.asarray(points, jnp.float32)
    without, _, _ = spherical_kmeans(points, 3, key, 1)
    assert np.bincount(without, minlength=3).min() == 0
    cluster, _, centroids = spherical_kmeans(points, 3, key, 10, reseed=True)
    assert np.bincount(cluster, minlength=3).min() > 0
    assert np.sum(np.asarray(cluster) == cluster[far]) == 1
    np.testing.assert_allclose(centroids[cluster[far]], [1, 0, 0], atol=1e-6)
