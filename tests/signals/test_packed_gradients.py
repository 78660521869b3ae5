"""The gradient of a packed row is that of its token-mean loss: its examples', each by its share of the targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import collated
from dataflex_jax.data.rows import Row
from dataflex_jax.policies.signals import Projection
from dataflex_jax.signals.directions import add_gradient
from dataflex_jax.signals.gradients import directional_derivatives, gradient_features, gradient_norms
from dataflex_jax.signals.rows import named_leaves
from tests.helpers.gradient_model import ADAPTED, assert_same, build, expected_features, materialised

LENGTH = 16
MEMBERS = ((0, 3), (1, 2, 4), (5,))  # examples of each row
SIZES = (7, 5, 6, 9, 4, 11)


@functools.cache
def examples():
    """(tokens, targets) of each: its first two tokens are a prompt."""
    rng = np.random.default_rng(0)
    return [(rng.integers(1, 64, n).astype(np.int32), np.arange(n) >= 2) for n in SIZES]


def packed():
    """As `PackedRows.row` makes them."""
    rows = []
    for members in MEMBERS:
        tokens, targets = zip(*(examples()[i] for i in members), strict=True)
        sizes = [len(t) for t in tokens]
        numbers = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)[:-1]
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])[:-1]
        rows.append(Row(np.concatenate(tokens), np.concatenate(targets)[1:], numbers, positions))
    return jax.tree.map(jnp.asarray, collated(rows, LENGTH, [0] * len(rows), packed=True))


@functools.cache
def expected():
    """Every adapter's gradient of each packed row, of its examples alone."""
    alone = [Row(tokens, targets[1:]) for tokens, targets in examples()]
    batch = jax.tree.map(jnp.asarray, collated(alone, LENGTH, [0] * len(alone)))
    counts = np.array([targets[1:].sum() for _, targets in examples()], float)
    shares = np.zeros((len(MEMBERS), len(SIZES)))
    for row, members in enumerate(MEMBERS):
        shares[row, list(members)] = counts[list(members)] / counts[list(members)].sum()
    gradients = materialised(build(ADAPTED), batch)
    return {path: np.einsum("re,e...->r...", shares, np.asarray(g, np.float64)) for path, g in gradients.items()}


@pytest.mark.parametrize("method", ["sketch", pytest.param("kronecker", marks=pytest.mark.slow)])
def test_features_are_those_of_the_rows_gradients(method):
    projection = Projection(method, 60)
    got = jax.jit(gradient_features(projection))(build(ADAPTED), packed())
    assert_same(got, expected_features(projection, expected()))


def test_norms_and_products_are_those_of_the_rows_gradients():
    model, batch = build(ADAPTED), packed()
    flat = np.concatenate([g.reshape(len(g), -1) for g in expected().values()], axis=1)
    np.testing.assert_allclose(jax.jit(gradient_norms())(model, batch), np.linalg.norm(flat, axis=1), rtol=1e-5)
    directions = jax.tree.map(lambda x: jnp.stack([x, jnp.ones_like(x)]), model.params)
    along = np.concatenate([np.asarray(leaf).reshape(2, -1) for leaf in named_leaves(directions).values()], axis=1)
    assert_same(jax.jit(directional_derivatives)(model, batch, directions), flat @ along.T)


@pytest.mark.slow
def test_sums_are_those_of_the_rows_gradients():
    model, weights = build(ADAPTED), jnp.array([0.5, -2.0, 3.0])
    nothing = {path: jnp.zeros((1, *leaf.shape)) for path, leaf in named_leaves(model.params).items()}
    got = jax.jit(add_gradient)(nothing, 0, model, packed(), weights)
    for path, gradient in expected().items():
        assert_same(np.asarray(got[path][0]), np.tensordot(np.asarray(weights), gradient, 1))


@pytest.mark.slow
def test_padding_and_neighbours_change_nothing():
    """A row's numbers do not depend on who else is in the batch."""
    features = jax.jit(gradient_features(Projection("sketch", 60)))
    whole = features(build(ADAPTED), packed())
    alone = jax.tree.map(lambda leaf: leaf[1:2], packed())
    np.testing.assert_allclose(features(build(ADAPTED), alone), whole[1:2], rtol=1e-4, atol=1e-5)
