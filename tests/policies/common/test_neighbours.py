"""Nearest neighbours and kernel densities against NumPy's brute force."""

import jax
import numpy as np
import pytest

from dataflex_jax.policies.common import neighbours
from dataflex_jax.policies.common.neighbours import kernel_densities, nearest, usable


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def distances_of(queries, points):
    differences = queries[:, None].astype(np.float64) - points[None].astype(np.float64)
    return np.linalg.norm(differences, axis=2)


@pytest.fixture(params=[True, False], ids=["host", "devices"], autouse=True)
def selecting(request, monkeypatch):
    """Who finds the nearest of a tile: on CPUs it is the host."""
    monkeypatch.setattr(neighbours, "_host_selects", lambda mesh: request.param)


@pytest.fixture(params=[(64, 131072, 4096), (5, 16, 10), (64, 7, 64)], ids=str)
def tiles(request, monkeypatch):
    for name, value in zip(("_QUERIES", "_POINTS", "_ROUND"), request.param, strict=True):
        monkeypatch.setattr(neighbours, name, value)


@pytest.mark.parametrize("k", [1, 9, 60])
def test_neighbours_equal_brute_force(tiles, k):
    """Of hidden states with a large offset, whose cosines are all near 1."""
    rng = np.random.default_rng(0)
    queries, points = (unit(20 + rng.normal(size=(n, 24))) for n in (13, 60))
    found = nearest(queries, points, k)
    expected = distances_of(queries, points)
    order = np.argsort(expected, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(expected, order, axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.closest, expected.min(axis=0), rtol=1e-4)


def test_of_equal_distances_the_lower_id_comes_first(tiles):
    rng = np.random.default_rng(1)
    few = unit(rng.normal(size=(5, 8)))
    which = rng.integers(0, 5, 50)
    queries = unit(rng.normal(size=(7, 8)))
    found = nearest(queries, few[which], 40)
    order = np.argsort(distances_of(queries, few)[:, which], axis=1, kind="stable")
    np.testing.assert_array_equal(found.ids, order[:, :40])


def test_rows_that_are_zero_or_not_finite_are_no_neighbours(tiles):
    rng = np.random.default_rng(2)
    points = unit(rng.normal(size=(30, 4)))
    bad = [0, 6, 7, 8, 29]
    points[bad] = 0
    points[[6, 29], 1] = np.nan, np.inf
    np.testing.assert_array_equal(np.flatnonzero(~usable(points)), bad)
    found = nearest(unit(rng.normal(size=(6, 4))), points, 100)
    good = np.setdiff1d(np.arange(30), bad)
    np.testing.assert_array_equal(np.sort(found.ids, axis=1), np.tile(good, (6, 1)))
    assert np.isfinite(found.distances).all()
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found.closest)), bad)


def test_results_do_not_depend_on_the_tiles(monkeypatch):
    rng = np.random.default_rng(3)
    queries, points = unit(rng.normal(size=(20, 16))), unit(rng.normal(size=(100, 16)))
    whole = nearest(queries, points, 10)
    monkeypatch.setattr(neighbours, "_QUERIES", 6)
    monkeypatch.setattr(neighbours, "_POINTS", 32)
    tiled = nearest(queries, points, 10)
    np.testing.assert_array_equal(tiled.ids, whole.ids)
    np.testing.assert_allclose(tiled.distances, whole.distances, rtol=1e-6)


def test_eight_devices_find_what_one_does(monkeypatch):
    monkeypatch.setattr(neighbours, "_POINTS", 8)
    rng = np.random.default_rng(6)
    queries, points = unit(rng.normal(size=(13, 16))), unit(rng.normal(size=(101, 16)))
    points[[4, 50]] = points[3]
    points[100] = np.nan
    found = {k: (nearest(queries, points, k), kernel_densities(points[:100], k, 1.2)) for k in (3, 90)}
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        for k, (alone, density) in found.items():
            split = nearest(queries, points, k)
            np.testing.assert_array_equal(split.ids, alone.ids)
            np.testing.assert_allclose(split.distances, alone.distances, rtol=1e-5)
            np.testing.assert_allclose(split.closest, alone.closest, rtol=1e-5)
            np.testing.assert_allclose(kernel_densities(points[:100], k, 1.2), density, rtol=1e-5)


def test_densities_do_not_depend_on_where_it_gets_crowded(monkeypatch):
    """The first round has no more than k points within sigma, a later one has, and from there on all are sorted."""
    monkeypatch.setattr(neighbours, "_ROUND", 10)
    rng = np.random.default_rng(7)
    points = np.concatenate([3 * np.eye(40, dtype=np.float32)[:15], 0.1 * unit(rng.normal(size=(25, 40)))])
    squares = np.sort(distances_of(points, points) ** 2, axis=1)[:, :4]
    expected = np.maximum(0, 1 - squares).sum(axis=1)
    np.testing.assert_allclose(kernel_densities(points, 4, 1.0), expected, rtol=1e-5)


@pytest.mark.parametrize(("k", "sigma"), [(60, 0.9), (7, 0.9), (3, 10.0), (1, 0.5)])
def test_densities_equal_brute_force(tiles, k, sigma):
    points = unit(np.random.default_rng(4).normal(size=(60, 3)))
    squares = np.sort(distances_of(points, points) ** 2, axis=1)[:, :k]
    expected = np.maximum(0, 1 - squares / sigma**2).sum(axis=1)
    np.testing.assert_allclose(kernel_densities(points, k, sigma), expected, rtol=1e-5)


def test_a_kernel_without_width_sees_each_point_alone():
    np.testing.assert_array_equal(kernel_densities(np.ones((4, 2), np.float32), 4, 0.0), 1)


def test_duplicates_count_in_full():
    points = np.repeat(unit(np.random.default_rng(5).normal(size=(3, 16))), 4, axis=0)
    np.testing.assert_allclose(kernel_densities(points, 12, 0.01), 4, rtol=1e-2)
