"""The maps as explicit matrices: their entries, and over many seeds their means and variances against the formulas."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.signals import Projection
from dataflex_jax.signals import projections
from dataflex_jax.signals.projections import _chunks, check, kronecker_signs, kronecker_widths, project

QUERY = "layers/attention/q_proj/kernel"


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def matrix(projection, path, layer, shape):
    """[dim, numbers]"""
    numbers = math.prod(shape)
    images = jax.vmap(functools.partial(project, projection, path, layer))(jnp.eye(numbers).reshape(numbers, *shape))
    return images.T


def images(projection, parts, seeds):
    """[seeds, dim] of the sum over (path, layer, gradient)."""

    @jax.jit
    @jax.vmap
    def image(seed):
        of_seed = projection._replace(seed=seed)
        return sum(project(of_seed, path, layer, jnp.asarray(x, jnp.float32)) for path, layer, x in parts)

    return np.asarray(image(jnp.arange(seeds)), np.float64)


@pytest.mark.parametrize("shape", [(24, 10), (3, 40), (16, 4), (1, 70), (35,), (), (8, 32), (5, 97)])
@pytest.mark.parametrize("path", [QUERY, "layers/mlp/down_proj/kernel"])
def test_a_sketch_puts_every_number_in_one_bucket_with_a_sign(shape, path):
    map_ = np.asarray(matrix(Projection("sketch", 32), path, 1, shape))
    assert map_.shape == (32, np.prod(shape))
    assert set(np.unique(map_)) <= {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal(np.abs(map_).sum(axis=0), 1)


def test_chunks_are_never_longer_than_the_circle_and_hardly_padded():
    for rows, columns in [(24, 10), (3, 40), (16, 4), (1, 70), (896, 4864), (4864, 896), (18944, 3584), (1009, 16)]:
        chunks = _chunks(jnp.ones((rows, columns)), 32 if columns < 100 else 8192)
        assert chunks.shape[1] <= (32 if columns < 100 else 8192)
        assert float(chunks.sum()) == rows * columns
        assert chunks.size <= 1.1 * rows * columns + chunks.shape[1]


def test_a_rademacher_map_is_dense():
    map_ = np.asarray(matrix(Projection("rademacher", 32), QUERY, 0, (40, 30)))  # more than one block
    np.testing.assert_allclose(np.abs(map_), 1 / np.sqrt(32), rtol=1e-6)
    # Independent entries: no two columns agree more than chance has it.
    correlations = map_.T @ map_
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 0.95
    assert correlations.std() == pytest.approx(1 / np.sqrt(32), rel=0.05)


@pytest.mark.parametrize("shape", [(40, 60), (7, 5)])
def test_a_gpus_form_of_a_dense_map_is_the_same_map(shape, monkeypatch):
    """Several blocks at once, filled up, and products of parts in bfloat16; of one example and of several."""
    projection = Projection("rademacher", 48)
    x = np.random.default_rng(0).normal(size=(3, *shape)) * np.logspace(-6, 6, math.prod(shape)).reshape(shape)
    x = jnp.asarray(x, jnp.float32)
    image = functools.partial(project, projection, QUERY, 2)
    expected = np.stack([image(row) for row in x])
    monkeypatch.setattr(projections, "program_device", lambda: types.SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(projections, "_SIGNS", 2 * 1024 * 48)
    found = np.asarray(jax.vmap(image)(x))
    norms = np.linalg.norm(x.reshape(3, -1), axis=1, keepdims=True)
    np.testing.assert_allclose(found / norms, expected / norms, rtol=0, atol=1e-6)
    np.testing.assert_allclose(image(x[0]) / norms[0], expected[0] / norms[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["sketch", "rademacher"])
def test_maps_differ_by_seed_layer_and_path_only(method):
    projection = Projection(method, 16, seed=3)
    first = matrix(projection, QUERY, 1, (6, 4))
    np.testing.assert_array_equal(first, matrix(projection, QUERY, jnp.int32(1), (6, 4)))
    others = [
        matrix(projection, QUERY, 0, (6, 4)),
        matrix(projection, "layers/attention/k_proj/kernel", 1, (6, 4)),
        matrix(projection._replace(seed=4), QUERY, 1, (6, 4)),
    ]
    assert all(np.any(first != other) for other in others)


def pair_sum(x, y, together):
    """sum over pairs i != j with `together` of x_i^2 y_j^2 + x_i y_i x_j y_j."""
    terms = np.outer(x**2, y**2) + np.outer(x * y, x * y)
    return (terms * together * ~np.eye(len(x), dtype=bool)).sum()


@pytest.mark.parametrize("method", ["sketch", "rademacher"])
def test_inner_products_are_unbiased_with_the_stated_variance(method):
    """On unequal numbers: outlier channels, as gradients have them, and two parameters."""
    dim, seeds, shape = 24, 40_000, (6, 12)
    rng = np.random.default_rng(0)
    channels = np.where(np.arange(6) == 2, 5.0, 1.0)[:, None]
    parts = [(QUERY, 0), (QUERY, 1)]
    x, y = (
        [rng.normal(size=shape) * channels for _ in parts],
        [rng.normal(size=shape) * channels + 0.3 for _ in parts],
    )
    of_x, of_y = (
        images(Projection(method, dim), [(*part, v) for part, v in zip(parts, values, strict=True)], seeds)
        for values in (x, y)
    )
    products = (of_x * of_y).sum(axis=1)
    # Chunks run along the inputs within an output channel, so the numbers are laid out transposed.
    flat_x, flat_y = (np.concatenate([v.T.ravel() for v in values]) for values in (x, y))
    together = np.ones((len(flat_x), len(flat_x)))
    if method == "sketch":
        chunk = np.concatenate([i * 100 + np.arange(72) // 24 for i in range(2)])  # 4 rows of 6 make a chunk of 24
        together = chunk[:, None] != chunk
    variance = pair_sum(flat_x, flat_y, together) / dim
    assert variance <= (flat_x @ flat_x * (flat_y @ flat_y) + (flat_x @ flat_y) ** 2) / dim
    assert products.mean() == pytest.approx(flat_x @ flat_y, abs=4 * np.sqrt(variance / seeds))
    assert products.var() == pytest.approx(variance, rel=0.05)


def kronecker_image(projection, path, layer, x):
    p_in, p_out = kronecker_signs(projection, path, layer, *x.shape)
    return (p_in.T @ x @ p_out).ravel() / np.sqrt(p_in.shape[1] * p_out.shape[1])


@pytest.mark.parametrize("rank_one", [False, True])
def test_kronecker_is_unbiased_and_within_the_stated_variance(rank_one):
    projection, seeds = Projection("kronecker", 24), 20_000
    rng = np.random.default_rng(0)
    x = np.outer(rng.normal(size=30), rng.normal(size=20)) if rank_one else rng.normal(size=(30, 20))
    y = x if rank_one else x + rng.normal(size=(30, 20))

    @jax.jit
    @jax.vmap
    def product(seed):
        of_seed = projection._replace(seed=seed)
        # Two layers: what they have in common must not add up.
        left, right = (sum(kronecker_image(of_seed, QUERY, i, jnp.asarray(v)) for i in (0, 1)) for v in (x, y))
        return left @ right

    products = np.asarray(product(jnp.arange(seeds)), np.float64)
    k_in, k_out = kronecker_widths(24)
    assert (k_in, k_out) == (4, 6)
    norms = (x**2).sum() * (y**2).sum()
    within = 2 * (2 / k_in + 2 / k_out + 4 / (k_in * k_out)) * norms
    between = 2 * (norms + (x * y).sum() ** 2) / 24
    assert products.mean() == pytest.approx(2 * (x * y).sum(), abs=4 * products.std() / np.sqrt(seeds))
    assert products.var() < 1.05 * (within + between)
    # Twice that of a dense map (between and within two matrices) at least where the gradient has rank one.
    assert (products.var() > 0.85 * (within + between)) == rank_one


@pytest.mark.parametrize(("dim", "widths"), [(8192, (64, 128)), (1024, (32, 32)), (97, (9, 10)), (1, (1, 1))])
def test_kronecker_widths(dim, widths):
    assert kronecker_widths(dim) == widths


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (Projection("sketchy"), r"^method = 'sketchy': must be one of sketch, rademacher, kronecker, none$"),
        (Projection(dim=0), r"^dim = 0: must be a positive integer$"),
        (Projection(dim=1.5), r"^dim = 1.5: "),
    ],
)
def test_impossible_projections_are_refused(projection, message):
    with pytest.raises(ValueError, match=message):
        check(projection)
