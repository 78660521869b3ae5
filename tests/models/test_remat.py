"""What the policies keep: less memory, the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models.config import REMAT_POLICIES
from dataflex_jax.models.remat import remat_policy
from tests.models.test_decoder import assert_same_trees, build, mean_loss


@pytest.mark.slow
def test_remat_changes_memory_and_not_gradients():
    tokens = np.random.RandomState(1).randint(0, 31, (4, 129))
    used, gradients = {}, {}
    for policy in REMAT_POLICIES:
        _, graphdef, params = build("qwen3", remat=policy)
        gradient = jax.jit(jax.grad(functools.partial(mean_loss, graphdef))).lower(params, tokens).compile()
        used[policy] = gradient.memory_analysis().temp_size_in_bytes
        gradients[policy] = gradient(params, tokens)
        assert_same_trees(gradients[policy], gradients["none"], atol=1e-6)
    assert used["none"] > used["dots"] > used["attention"] > used["full"]


def test_unknown_remat_policy_is_named():
    with pytest.raises(InputError, match=r"remat='some'.*'full'"):
        remat_policy("some", jnp.dtype("float32"))
