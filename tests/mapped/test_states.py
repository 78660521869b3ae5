"""The states of several models as one."""

import jax
import jax.numpy as jnp

from dataflex_jax.mapped import states


def test_a_member_that_is_not_finite_is_found():
    trees = [
        {"weight": jnp.array([1.0, value]), "step": jnp.int32(1), "key": jax.random.key(0)}
        for value in (0.0, jnp.nan, jnp.inf)
    ]
    assert states.finite(states.stacked(trees)).tolist() == [True, False, False]
