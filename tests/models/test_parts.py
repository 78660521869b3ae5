"""Parameters taken apart and put together, chosen by patterns, and told from others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax import sharding
from dataflex_jax.errors import InputError
from dataflex_jax.models import layout, parts
from tests.helpers.tiny_model import MODEL, adapted, created

TREE = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}


@pytest.fixture(scope="module")
def params():
    return created(dataclasses.replace(MODEL, tie_word_embeddings=False)).params


@pytest.fixture(scope="module")
def adapted_params():
    return created(adapted()).whole()


def test_paths_and_leaves():
    assert parts.paths(TREE) == ["a/b", "a/c/d", "a/c/e", "f"]
    assert list(parts.leaves(TREE)) == [("a/b", 1), ("a/c/d", 2), ("a/c/e", 3), ("f", 4)]
    assert parts.paths({}) == []


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["a/c/d"], ({"a": {"b": 1, "c": {"e": 3}}, "f": 4}, {"a": {"c": {"d": 2}}})),
        (["a/c/d", "a/c/e"], ({"a": {"b": 1}, "f": 4}, {"a": {"c": {"d": 2, "e": 3}}})),
        ([], (TREE, {})),
        (["a/b", "a/c/d", "a/c/e", "f"], ({}, TREE)),
    ],
)
def test_combined_is_the_inverse_of_split(trained, expected):
    frozen, chosen = parts.split(TREE, trained.__contains__)
    assert (frozen, chosen) == expected
    assert parts.combined(frozen, chosen) == parts.combined(chosen, frozen) == TREE


def test_combined_leaves_its_parts_as_they_were():
    frozen, trained = parts.split(TREE, "a/c/d".__eq__)
    before = repr((frozen, trained))
    parts.combined(frozen, trained)
    assert repr((frozen, trained)) == before
    assert parts.combined(None, trained) is trained


def trained_of(params, patterns):
    accepts = parts.trained_paths(params, patterns)
    return {path for path in parts.paths(params) if accepts(path)}


def test_without_patterns_all_is_trained_or_the_adapters_alone(params, adapted_params):
    assert parts.trained_paths(params, None) is None
    assert trained_of(adapted_params, None) == {path for path in parts.paths(adapted_params) if "/lora_" in path}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("lm_head/kernel",), {"lm_head/kernel"}),
        (("norm/*", "lm_head/*"), {"norm/scale", "lm_head/kernel"}),
        (
            ("*/scale",),
            {"norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"},
        ),
        (("layers/attention/[qk]_proj/bias",), {"layers/attention/q_proj/bias", "layers/attention/k_proj/bias"}),
        (("layers/mlp/*", "!*/up_proj/*"), {f"layers/mlp/{name}_proj/kernel" for name in ("gate", "down")}),
        (("layers/mlp/*", "layers/mlp/u*"), {f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}),
    ],
)
def test_patterns_choose_by_path(params, patterns, expected):
    assert trained_of(params, patterns) == expected
    assert trained_of(jax.eval_shape(lambda: params), list(patterns)) == expected


def test_adapters_are_trained_beside_what_patterns_choose(adapted_params):
    adapters = trained_of(adapted_params, None)
    assert trained_of(adapted_params, ("norm/scale",)) == adapters | {"norm/scale"}
    assert trained_of(adapted_params, ()) == adapters


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("norm/scale", "lm_haed/*"),
            r"^config\.model\.trainable: 'lm_haed/\*' matches no parameter; they .*lm_he",
        ),
        (
            ("lm_head",),
            "'lm_head' matches no parameter; they are .*embed_tokens/embedding",
        ),  # not a path, a part of one
        (("Norm/scale",), "'Norm/scale' matches no parameter"),
        (("*", "!*/lm_haed/*"), r"'!\*/lm_haed/\*' matches no parameter"),
        (("!norm/*",), r"^config\.model\.trainable = \('!norm/\*',\): nothing would be trained; None trains all$"),
        ((), r"^config\.model\.trainable = \(\): nothing would be trained; None trains all$"),
    ],
)
def test_patterns_that_choose_nothing_are_refused_in_one_line(params, patterns, message):
    with pytest.raises(InputError, match=message) as error:
        parts.trained_paths(params, patterns)
    assert "\n" not in str(error.value)


def test_a_fingerprint_knows_every_bit_and_place_but_not_the_mesh():
    base = created(MODEL).params
    known = parts.fingerprint(base)
    assert len(known) == 16
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    assert parts.fingerprint(jax.device_put(base, layout.param_shardings(mesh, base))) == known
    assert parts.fingerprint(jax.tree.map(np.asarray, base)) == known

    def changed(change):
        query = base["layers"]["attention"]["q_proj"]
        attention = base["layers"]["attention"] | {"q_proj": query | {"kernel": change(query["kernel"])}}
        return parts.fingerprint(base | {"layers": base["layers"] | {"attention": attention}})

    others = [
        changed(lambda kernel: kernel.at[1, 2, 3].set(jnp.nextafter(kernel[1, 2, 3], jnp.inf))),
        changed(lambda kernel: kernel.at[0, 0, jnp.array([0, 1])].set(kernel[0, 0, jnp.array([1, 0])])),
        changed(lambda kernel: kernel.swapaxes(1, 2)),
        changed(lambda kernel: kernel.astype(jnp.bfloat16)),
    ]
    assert len({known, *others}) == 5


def test_fingerprints_stay_as_they_were():
    """Checkpoints hold them."""
    tree = {"b": np.arange(6, dtype=np.float32).reshape(2, 3) / 7, "a": {"c": np.ones(4, jnp.bfloat16)}}
    assert parts.fingerprint(tree) == "9515d67f004e0612"
