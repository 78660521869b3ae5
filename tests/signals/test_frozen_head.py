"""The cross-entropy whose weight is a constant against the one that differentiates everything."""

import jax
import numpy as np
import pytest

from dataflex_jax.models.loss import cross_entropy
from dataflex_jax.sharding import make_mesh
from tests.test_sharding import MESHES


@pytest.mark.parametrize("mesh_name", [None, "all"])
@pytest.mark.parametrize("tile_tokens", [12, 1000])
def test_the_hidden_gradient_is_the_same_and_the_weights_is_zero(tile_tokens, mesh_name):
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(4, 13, 8)).astype(np.float32), rng.normal(size=(8, 32)).astype(np.float32)
    labels, upstream = rng.integers(0, 32, (4, 13)), rng.uniform(-1, 2, (4, 13)).astype(np.float32)

    def objective(hidden, weight, frozen):
        losses = cross_entropy(hidden, weight, labels, tile_tokens=tile_tokens, frozen_weight=frozen)
        return (losses * upstream).sum(), losses

    differentiate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, expected), (d_hidden, _) = differentiate(hidden, weight, False)
    with jax.set_mesh(make_mesh(MESHES[mesh_name] if mesh_name else {"data": 8})):
        (_, losses), (actual, d_weight) = differentiate(hidden, weight, True)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual, d_hidden, rtol=0, atol=1e-5)
    assert not np.any(d_weight)
