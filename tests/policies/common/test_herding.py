"""Density and order inside clusters against the definitions, in float64."""

import numpy as np
import pytest

from dataflex_jax.policies.common import herding
from dataflex_jax.policies.common.herding import inside_clusters


def kernels(points):
    points = points.astype(np.float64)
    return np.exp(-((points[:, None] - points[None]) ** 2).sum(axis=2))


def order(points):
    """Greedily by the squared maximum mean discrepancy itself."""
    kernel, taken, left = kernels(points), [], list(range(len(points)))

    def discrepancy(some):
        return kernel.mean() + kernel[np.ix_(some, some)].mean() - 2 * kernel[some].mean()

    while left:
        values = np.round([discrepancy([*taken, each]) for each in left], 9)
        taken.append(left.pop(int(np.argmin(values))))
    return taken


def transcription(points, cluster, count):
    density, place = np.ones(count), np.zeros(len(points), int)
    for number in range(count):
        members = np.flatnonzero(cluster == number)
        if len(members) > 1:
            kernel = kernels(points[members])
            density[number] = kernel[~np.eye(len(members), dtype=bool)].mean()
        if len(members):
            place[members[order(points[members])]] = np.arange(len(members))
    return density, place


def random_points(seed, n=70, width=5):
    points = 2 + np.random.default_rng(seed).normal(size=(n, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


# The second holds no kernel matrix, and is made of clusters one by one.
@pytest.mark.parametrize(("at_once", "largest"), [(64, 4096), (1, 2)])
def test_density_and_order_are_as_defined(monkeypatch, at_once, largest):
    monkeypatch.setattr(herding, "_POINTS", at_once)
    monkeypatch.setattr(herding, "_LARGEST", largest)
    points = random_points(0)
    # Of 1, 2, 20, 3 and no members, and the rest.
    cluster = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3, 5], [1, 2, 20, 3, 44]))
    found = inside_clusters(points, cluster, 6)
    density, place = transcription(points, cluster, 6)
    np.testing.assert_allclose(found.density, density, rtol=1e-5)
    np.testing.assert_array_equal(found.place, place)


def test_of_equal_points_the_first_is_taken():
    points = np.repeat(random_points(2, n=1), 6, axis=0)
    found = inside_clusters(points, np.array([0, 1, 0, 1, 0, 0]), 2)
    np.testing.assert_array_equal(found.place, [0, 0, 1, 1, 2, 3])
    np.testing.assert_allclose(found.density, 1, rtol=1e-6)
