"""The poolings of hidden states, against float64 transcriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.common import pooling
from tests.helpers.hidden_states import pooled, random_hidden


@pytest.mark.parametrize("how", ["position_weighted_mean", "mean", "last_token"])
def test_pooling_equals_the_transcription_whichever_side_is_padded(how):
    hidden, mask = random_hidden(0)
    embed = jax.jit(getattr(pooling, how))
    np.testing.assert_allclose(embed(jnp.asarray(hidden), jnp.asarray(mask)), pooled(hidden, mask, how), atol=1e-6)
    half = embed(jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(mask))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, pooled(hidden, mask, how), atol=2e-2)
    np.testing.assert_array_equal(embed(jnp.asarray(hidden), jnp.zeros_like(mask)), np.zeros((5, 6)))


@pytest.mark.parametrize("empty", [0.0, np.nan])
def test_without_normalisation_lengths_count_and_a_row_of_padding_has_the_number_asked_for(empty):
    hidden, mask = random_hidden(0)
    mask[4] = 0
    hidden = hidden.astype(np.float32)
    mean, last = (
        np.asarray(jax.jit(embed, static_argnames=("normalised", "empty"))(hidden, mask, normalised=False, empty=empty))
        for embed in (pooling.mean, pooling.last_token)
    )
    real = [states[kept > 0].astype(np.float64) for states, kept in zip(hidden[:4], mask[:4], strict=True)]
    np.testing.assert_allclose(mean[:4], [states.mean(axis=0) for states in real], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(last[:4], np.float32([states[-1] for states in real]))
    for pooled_rows in (mean, last):
        np.testing.assert_array_equal(pooled_rows[4], np.full(6, empty, np.float32))
