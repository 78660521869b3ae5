"""What the selectors by influence share."""

import jax.numpy as jnp
import numpy as np

from dataflex_jax.policies import Projection
from dataflex_jax.policies.common.influence import InfluenceOptions, unit


def test_unit_rows_have_length_one():
    rows = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(unit(jnp.asarray(rows)), axis=1), 1, rtol=1e-6)


def test_kronecker_goes_with_sgd():
    settings = InfluenceOptions(proj_dim=64, projection="kronecker", gradient_type="sgd", projection_seed=3).influence()
    assert settings.adam is None
    assert settings.projection == Projection("kronecker", 64, 3)
