"""LESS's scores without a projection against those recorded with the PyTorch peer's model and gradients."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.models import layout, parts
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.signals.gradients import gradient_features
from dataflex_jax.signals.moments import Moments
from dataflex_jax.signals.rows import map_named
from tests.helpers import tiny_model

RECORDED = Path(__file__).parents[3] / "shared/reference/less_micro.npz"
pytestmark = pytest.mark.skipif(not RECORDED.exists(), reason="the peer's recorded numbers are not here")

MODEL = ModelConfig(
    architecture="qwen2",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    dtype="float32",
    lora=LoraConfig(rank=4, alpha=8),
)


KINDS = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight", "bias": "bias"}


def of_peer(arrays, path, leaf):
    """The parameter of that path, stacked over layers and [in, out]."""
    *modules, kind = path.split("/")
    owner = "lora/base_model.model.model" if kind in layout.FACTORS else "base/model"
    end = ".".join("self_attn" if module == "attention" else module for module in modules)
    end = f"{end}.{KINDS.get(kind, 'weight')}"
    if modules[0] == "layers":
        end = end.removeprefix("layers.")
        found = [arrays[f"{owner}.layers.{i}.{end}"] for i in range(MODEL.num_hidden_layers)]
    else:
        found = [arrays[f"{owner}.{end}"]]
    found = [x.T if kind in ("kernel", *layout.FACTORS) else x for x in found]
    value = np.stack(found) if modules[0] == "layers" else found[0]
    assert value.shape == leaf.shape, path
    return jnp.asarray(value)


def batch_of(recorded, split):
    labels = recorded[f"{split}_labels"]
    tokens = recorded[f"{split}_input_ids"]
    return tiny_model.batch_of(jnp.asarray(tokens, jnp.int32), mask=jnp.asarray(labels[:, 1:] != -100, jnp.float32))


def test_exact_scores():
    recorded = dict(np.load(RECORDED))
    shape = jax.eval_shape(functools.partial(Model.random, MODEL), jax.random.key(0))
    model = shape.having(map_named(functools.partial(of_peer, recorded), shape.params)).training(parts.is_adapter)

    def unflattened(flat):
        sizes = [recorded[f"lora/{name}"].shape for name in recorded["param_order"]]
        pieces = np.split(flat, np.cumsum([np.prod(size) for size in sizes])[:-1])
        named = {f"lora/{n}": p.reshape(s) for n, p, s in zip(recorded["param_order"], pieces, sizes, strict=True)}
        return map_named(functools.partial(of_peer, named), model.params)

    moments = Moments(
        mu=unflattened(recorded["adam_m"]),
        nu=unflattened(recorded["adam_v"]),
        count=jnp.int32(6),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
    )
    features = jax.jit(gradient_features(Projection("none")))
    steps = np.asarray(features(model, batch_of(recorded, "train"), moments), np.float64)
    targets = np.asarray(features(model, batch_of(recorded, "eval")), np.float64)
    np.testing.assert_allclose(np.linalg.norm(targets, axis=1), recorded["eval_grad_norms"], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), recorded["train_adam_norms"], rtol=1e-4)
    steps, targets = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (steps, targets))
    cosines = steps @ targets.T
    np.testing.assert_allclose(cosines, recorded["exact_cos"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(cosines.mean(axis=1), recorded["exact_scores"], rtol=0, atol=1e-5)
    best = np.argsort(-cosines.mean(axis=1), kind="stable")[:16]
    assert set(best) == set(recorded["exact_topk16"])
