"""Adam's moments in the states of optax's chains; tests/signals/test_gradients.py has what they do to gradients."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.signals import moments
from dataflex_jax.signals.moments import adam_moments
from tests.helpers.gradient_model import BETAS


def test_moments_are_found_in_a_chain_and_asked_for_where_there_are_none():
    params = {"w": jnp.ones(3)}
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))
    state = adam.init(params)
    _, state = adam.update({"w": jnp.arange(3.0)}, state, params)
    found = adam_moments(state, b1=0.9, b2=0.999, eps=1e-8)
    clipped = np.arange(3) / np.sqrt(5)
    np.testing.assert_allclose(found.mu["w"], 0.1 * clipped, rtol=1e-6)
    np.testing.assert_allclose(found.nu["w"], 0.001 * clipped**2, rtol=1e-5)
    assert found.count == 1
    with pytest.raises(ValueError, match=r"^opt_state: has no Adam state"):
        adam_moments(optax.sgd(0.1, momentum=0.9).init(params), **BETAS)
    with pytest.raises(ValueError, match=r"^opt_state: has more than one Adam state"):
        adam_moments((state, state), **BETAS)
    with pytest.raises(ValueError, match=r"^eps_mode = 'under': must be one of outside, inside"):
        adam_moments(state, **BETAS, eps_mode="under")


def test_moments_without_a_step_are_said_once(caplog):
    moments._say_fresh.cache_clear()
    params = {"w": jnp.ones(3)}
    optimizer = optax.adamw(0.1)
    fresh = optimizer.init(params)
    _, used = optimizer.update({"w": jnp.ones(3)}, fresh, params)
    for state, lines in ((used, 0), (fresh, 1), (fresh, 1)):
        moments.say_if_fresh(moments.AdamState(state, **BETAS))
        assert len(caplog.records) == lines
    assert "the optimizer has taken no step" in caplog.text
