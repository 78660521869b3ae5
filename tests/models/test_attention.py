"""Attention against a plain NumPy softmax, and the choice of its backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models.attention import causal_attention, choose_implementation, split_by_heads
from dataflex_jax.sharding import make_mesh


def reference(query, key, value, allowed):
    """softmax(q k / sqrt(H)) v in float64, over the (query, key) pairs that `allowed` [B, T, T] names."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    weights = np.where(allowed[:, None], np.exp(scores), 0)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_attention(window, packed):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 12, 6, 8))
    key, value = (jax.random.normal(k, (2, 12, 2, 8)) for k in keys[1:])
    segments = np.array([[0] * 5 + [1] * 7, [3] * 9 + [4] * 3]) if packed else None
    distance = np.arange(12)[:, None] - np.arange(12)
    allowed = np.broadcast_to((distance >= 0) & (distance < (window or 12)), (2, 12, 12))
    if packed:
        allowed = allowed & (segments[:, :, None] == segments[:, None])
    actual = causal_attention(query, key, value, segment_ids=segments, sliding_window=window)
    np.testing.assert_allclose(actual, reference(query, key, value, allowed), rtol=0, atol=1e-5)


VALID = {"backend": "gpu", "dtype": jnp.bfloat16, "head_dim": 64, "has_segments": False, "hopper": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backend": "cpu"}, "needs a GPU"),
        ({"dtype": jnp.float32}, "needs dtype bfloat16, not float32"),
        ({"head_dim": 20}, "multiple of 8"),
        ({"head_dim": 264}, "up to 256"),
        ({"head_dim": 136, "hopper": False}, "up to 128"),
        ({"has_segments": True, "most_segments": 8, "hopper": False}, "packed segments apart on a GPU of compute cap"),
        ({"has_segments": True, "most_segments": 8, "windowed": True}, "no sliding window among packed segments"),
        ({"has_segments": True}, "how many packed segments"),
    ],
)
def test_cudnn_only_where_it_is_valid(change, reason):
    assert choose_implementation("auto", **VALID) == choose_implementation("cudnn", **VALID) == "cudnn"
    assert choose_implementation("xla", **VALID) == "xla"
    assert choose_implementation("auto", **(VALID | change)) == "xla"
    with pytest.raises(InputError, match=reason):
        choose_implementation("cudnn", **(VALID | change))


def test_cudnn_keeps_as_many_packed_segments_apart_as_are_announced():
    assert choose_implementation("auto", **(VALID | {"has_segments": True, "most_segments": 8})) == "cudnn"


@pytest.mark.parametrize("heads", [(4, 2), (8, 8), (6, 2)])
def test_heads_are_split_alike_and_attention_is_the_same(heads):
    """By a mesh of 4 parts, which does not divide the last ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 12, heads[0], 8))
    key, value = (jax.random.normal(k, (2, 12, heads[1], 8)) for k in keys[1:])
    expected = causal_attention(query, key, value)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 4})):
        parts = jax.jit(split_by_heads)(query, key, value)
        actual = jax.jit(causal_attention)(*parts)
    split = heads[0] % 4 == 0
    assert [("tensor" in x.sharding.spec) for x in parts] == [split] * 3
    assert parts[1].shape[2] % (4 if split else 1) == 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_unknown_implementation_is_named():
    with pytest.raises(InputError, match=r"attention='flash'.*'cudnn'"):
        choose_implementation("flash", **VALID)
