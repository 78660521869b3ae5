"""Rows for new tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.models import layout, vocabulary
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.sharding import make_mesh
from tests.models.make_golden import MODELS, random_params


def placed(name, mesh, dtype="float32"):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), random_params(from_hf(MODELS[name]), 0))
    return jax.device_put(params, layout.param_shardings(mesh, params))


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "llama3", "mistral"])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_new_rows_are_the_mean_of_the_others(name, sizes):
    mesh = make_mesh(sizes)
    params = placed(name, mesh)
    shapes = vocabulary.of_size(layout.placed(mesh, params), 128)
    grown = vocabulary.grown(params, shapes)
    for leaf, like in zip(*map(jax.tree.leaves, (grown, shapes)), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    tables = [(params["embed_tokens"]["embedding"], grown["embed_tokens"]["embedding"])]
    assert ("lm_head" in params) == (not from_hf(MODELS[name]).tie_word_embeddings)
    if "lm_head" in params:
        tables.append((params["lm_head"]["kernel"].T, grown["lm_head"]["kernel"].T))
    for old, new in tables:
        assert new.shape[0] == 128 > old.shape[0]
        np.testing.assert_array_equal(new[: len(old)], old)
        np.testing.assert_allclose(new[len(old) :], np.broadcast_to(np.mean(old, 0), new[len(old) :].shape), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, grown["layers"], params["layers"])


def test_means_of_half_precision_are_taken_in_float32():
    mesh = make_mesh({"fsdp": 8})
    params = placed("qwen3", mesh, "bfloat16")
    old, wanted = params["embed_tokens"]["embedding"], vocabulary.of_size(layout.placed(mesh, params), 128)
    new = vocabulary.grown(params, wanted)["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(new[-1], np.mean(np.asarray(old, np.float32), 0).astype(jnp.bfloat16))


def test_a_part_without_tokens_and_a_vocabulary_that_is_large_enough_stay_as_they_are():
    mesh = make_mesh({"fsdp": 8})
    params = placed("qwen2_untied", mesh)
    layers, size = {"layers": params["layers"]}, params["embed_tokens"]["embedding"].shape[0]
    assert vocabulary.grown_paths(layers) == []
    assert vocabulary.grown_paths(params) == ["embed_tokens/embedding", "lm_head/kernel"]
    for tree in (layers, params):
        same = vocabulary.grown(tree, vocabulary.of_size(layout.placed(mesh, tree), size - 1))
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, tree)), strict=True))
