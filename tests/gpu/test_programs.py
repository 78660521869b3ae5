"""Every kind of program on a GPU, at sizes for which each takes seconds: it runs, and its numbers are the CPU's.

    JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/gpu

DATAFLEX_GPU_TESTS=dry runs them where there is none, which shows that the tests themselves work.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import Batch
from dataflex_jax.models import parts
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.generation.generate import generate
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.directions import beside
from dataflex_jax.signals.gradients import directional_derivatives, gradient_features, gradient_norms
from dataflex_jax.signals.rows import named_leaves, select_of, selected_paths
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat
from tests.helpers.tiny_model import assert_close, batch_of

pytestmark = pytest.mark.gpu
# Heads that cuDNN takes.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = SIZES | {"architecture": "qwen2", "vocab_size": 512, "num_hidden_layers": 3, "initializer_range": 0.05}
LENGTH = 128


@functools.cache
def build(lora: bool = False, **fields) -> Model:
    """With random adapters, of which both factors matter, or none."""
    cfg = ModelConfig(**(CONFIG | {"lora": LoraConfig(rank=8) if lora else None} | fields))
    model = jax.jit(Model.random, static_argnums=0)(cfg, jax.random.key(0))
    if not lora:
        return model
    model, rng = model.training(parts.is_adapter), np.random.default_rng(0)
    return model.with_params(jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), model.params))


def rows(packed: bool = False) -> Batch:
    """Eight full rows; packed, of three texts each, whose ends are elsewhere in each row."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 512, (8, LENGTH + 1)), jnp.int32)
    if not packed:
        return batch_of(tokens)
    ends = np.sort(rng.integers(10, LENGTH - 10, (8, 2)))
    places = np.arange(LENGTH)
    segments = (places >= ends[:, :1]).astype(np.int32) + (places >= ends[:, 1:])
    starts = np.where(segments == 0, 0, np.take_along_axis(ends, np.maximum(segments - 1, 0), axis=1))
    return batch_of(tokens, segment_ids=jnp.asarray(segments + 1), positions=jnp.asarray(places - starts, jnp.int32))


@jax.jit
def loss_and_gradient(model: Model, batch: Batch):
    """Of the trained parameters, as the train step computes it."""

    def loss(params):
        hooks = Hooks(frozen_head=model.head_is_frozen)
        return jnp.mean(model.with_params(params).token_losses(batch, hooks).losses)

    return jax.value_and_grad(loss)(model.params)


def on_cpu(function: Callable, model: Model, *arguments):
    """What a function gives of the model in float32 on a CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), jax.set_mesh(make_mesh({}, [cpu])):
        fields = {"dtype": "float32", "attention": "xla"}
        there = build(lora=model.config.lora is not None, **fields)
        placed = jax.device_put((model.params, model.frozen, arguments), cpu)
        return jax.device_get(jax.jit(lambda *a: function(*a))(there.having(*placed[:2]), *placed[2]))


def relative_error(actual, expected) -> float:
    """Of two trees, as vectors."""
    actual, expected = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_losses_and_gradients_in_bfloat16_are_those_of_a_cpu_in_float32(lora, packed):
    model, batch = build(lora), rows(packed)
    loss, gradient = loss_and_gradient(model, batch)
    expected_loss, expected_gradient = on_cpu(loss_and_gradient, model, batch)
    assert abs(float(loss) - float(expected_loss)) < 0.01
    assert relative_error(gradient, expected_gradient) < 0.05


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_packed_rows_are_those_of_xlas_attention(remat):
    batch = rows(packed=True)
    ours, xla = (loss_and_gradient(build(remat=remat, attention=name), batch) for name in ("auto", "xla"))
    assert abs(float(ours[0]) - float(xla[0])) < 0.005
    assert relative_error(ours[1], xla[1]) < 0.03


def one_of(direction):
    """A direction as the only one of several."""
    return jax.tree.map(lambda leaf: leaf[None], direction)


# Each of (model, batch).
SIGNALS = {
    "sketch": lambda model, batch: gradient_features(Projection("sketch", 256))(model, batch),
    "kronecker": lambda model, batch: gradient_features(Projection("kronecker", 256))(model, batch),
    "rademacher": lambda model, batch: gradient_features(Projection("rademacher", 64))(model, batch),
    "norms": lambda model, batch: gradient_norms()(model, batch),
    "directional": lambda model, batch: directional_derivatives(
        model, batch, jax.tree.map(lambda x: x[None], model.params)
    ),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_of_gradients_are_those_of_a_cpu(name):
    model, batch = build(), rows()
    found = jax.jit(SIGNALS[name])(model, batch)
    assert relative_error(found, on_cpu(SIGNALS[name], model, batch)) < 0.05


def test_exact_products_with_directions_are_those_of_a_cpu():
    model, batch = build(), rows()
    paths = selected_paths(model.params, select_of("blocks"))

    def influences(model, batch):
        leaves = named_leaves(one_of(loss_and_gradient(model, batch)[1]))
        return beside(model, batch, paths, {path: leaves[path] for path in paths}).influences

    assert relative_error(jax.jit(influences)(model, batch), on_cpu(influences, model, batch)) < 0.05


@pytest.mark.parametrize("samplers", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seeds_B": np.arange(8)}])
def test_generated_tokens_have_the_log_probabilities_of_the_training_pass(samplers):
    model, prompts, lengths, steps = build(), np.asarray(rows().tokens)[:, :32], np.arange(25, 33), 24
    generation = generate(model, prompts, lengths, max_new_tokens=steps, **samplers)
    texts = np.zeros((8, 32 + steps + 1), np.int32)
    for row, prompt, length, new in zip(texts, prompts, lengths, np.asarray(generation.tokens), strict=True):
        row[: length + steps] = [*prompt[:length], *new]
    losses = np.asarray(jax.jit(lambda m, b: m.token_losses(b).losses)(model, batch_of(jnp.asarray(texts))))
    expected = -np.stack([row[n - 1 : n - 1 + steps] for row, n in zip(losses, lengths, strict=True)])
    assert_close(generation.log_probs, expected, atol=0.2)
    assert np.abs(np.asarray(generation.log_probs) - expected).mean() < 0.02


def bfloat16(config):
    config.model.update(**SIZES, dtype="bfloat16", remat="dots")
    return config


@pytest.mark.parametrize("mixer", ["odm", "doge", "dynamic_moe"])
def test_a_run_that_mixes(mixer, tmp_path):
    config = bfloat16(tiny.config(tiny.write_domains(tmp_path / "data"), mixer))
    if mixer == "dynamic_moe":
        config.model.update(architecture="mixtral", num_experts=4, num_experts_per_tok=2)
    assert_trains(config, tmp_path)


@pytest.mark.parametrize(
    "policies",
    [
        {"selector": "less"},
        {"selector": "less", "lora__rank": 4},
        {"selector": "greats"},
        {"selector": "loss", "mixer": "odm", "weighter": "loss"},
        {"order": "sorting"},
        {"data__packing": True},
    ],
    ids=lambda policies: "+".join(map(str, policies.values())),
)
def test_a_run_on_questions(policies, tmp_path):
    root = tiny_chat.write_questions(tmp_path / "data")
    assert_trains(bfloat16(tiny_chat.config(root, **policies)), tmp_path)


def assert_trains(config, folder) -> None:
    """It comes to its end, goes on from a checkpoint, and its losses fall."""
    steps = config.train_step
    config.train_step = steps - 2
    train_and_evaluate(config, folder / "run")
    config.train_step = steps
    assert train_and_evaluate(config, folder / "run").step == steps
    losses = [line["loss"] for line in tiny.records(folder / "run", "metrics.jsonl")]
    assert len(losses) == steps
    assert np.mean(losses[-2:]) < losses[0]
