"""Signals of mixtures of experts: router loads, and gradients of routed experts beside one row at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.policies import Alignments, GateLoads, Projection
from dataflex_jax.signals.directions import beside
from dataflex_jax.signals.gradients import gradient_features, gradient_norms
from dataflex_jax.signals.model_signals import alignments, gate_loads
from dataflex_jax.signals.projections import project
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.rows import alone, named_leaves, row_loss, selected_paths
from dataflex_jax.training.oversampling import check_compared
from tests.helpers import gradient_model

MIXTURE = dataclasses.replace(
    gradient_model.MODEL, architecture="olmoe", qk_norm=None, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2
)
ATTENTION = ("layers/attention/q_proj/kernel", "layers/mlp/router/kernel")


@pytest.fixture(scope="module")
def model():
    return gradient_model.build(MIXTURE)


@pytest.fixture(scope="module")
def batch():
    return gradient_model.batch_of(rows=3, length=8)


@pytest.fixture(scope="module")
def gradients(model, batch):
    """By path, [B, ...], each row by itself."""

    def of_row(params, row):
        return row_loss(model.with_params(params).token_losses(alone(row)).losses[0], row)

    gradient = jax.jit(jax.grad(of_row))
    rows = [jax.tree.map(lambda leaf, b=b: leaf[b], batch.rows_alone()) for b in range(3)]
    return named_leaves(jax.tree.map(lambda *leaves: np.stack(leaves), *(gradient(model.params, row) for row in rows)))


def is_of_blocks(path):
    return path in selected_paths(gradient_model.build(MIXTURE).params)


def test_the_blocks_parameters_have_experts_and_router_among_them(model):
    paths = selected_paths(model.params)
    assert {"layers/mlp/experts/up_proj", "layers/mlp/router/kernel", "layers/attention/q_proj/kernel"} < set(paths)


def test_a_sketch_of_the_gradients_is_that_of_each_row_alone(model, batch, gradients):
    projection = Projection("sketch", 64)
    found = jax.jit(gradient_features(projection))(model, batch)
    expected = np.zeros((3, 64))
    image = jax.jit(project, static_argnums=(0, 1))
    for path in filter(is_of_blocks, gradients):
        for b, layer in np.ndindex(3, 2):
            expected[b] += image(projection, path, layer, gradients[path][b, layer])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected[:2]).max() > 0.1
    assert not found[2].any()


@pytest.mark.slow
def test_norms_and_influences_are_those_of_each_row_alone(model, batch, gradients):
    flat = np.concatenate([gradients[path].reshape(3, -1) for path in filter(is_of_blocks, gradients)], axis=1)
    norms = np.linalg.norm(flat.astype(np.float64), axis=1)
    np.testing.assert_allclose(jax.jit(gradient_norms())(model, batch), norms, rtol=1e-4, atol=1e-6)
    directions = {path: jnp.asarray(gradients[path][:1]) for path in filter(is_of_blocks, gradients)}
    found = jax.jit(beside, static_argnums=2)(model, batch, tuple(directions), directions).influences
    np.testing.assert_allclose(found[:2, 0], flat[:2] @ flat[0] / norms[:2], rtol=1e-4)


@pytest.mark.slow
def test_alignments_are_inner_products(model, batch, gradients):
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 1, (1, *leaf.shape)), jnp.float32), model.params)
    found = jax.jit(alignments(Alignments()))(Subject(model), batch, direction)
    expected = sum(gradients[path].reshape(3, -1) @ leaf.ravel() for path, leaf in named_leaves(direction).items())
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_what_is_no_product_of_whole_rows_is_refused_by_name(model, batch):
    with pytest.raises(InputError, match=r"^layers/mlp/experts/down_proj is of routed experts.* such as sketch"):
        gradient_features(Projection("kronecker", 16))(model, batch)
    with pytest.raises(InputError, match=r"selector 'greats' compares .* routed experts \(layers/mlp/experts"):
        check_compared("greats", model.params)


def test_of_attention_and_router_the_products_are_right(model, batch, gradients):
    norms = jax.jit(gradient_norms(parameters=ATTENTION.__contains__))(model, batch)
    flat = np.concatenate([gradients[path].reshape(3, -1) for path in ATTENTION], axis=1)
    np.testing.assert_allclose(norms, np.linalg.norm(flat, axis=1), rtol=1e-4, atol=1e-6)
    check_compared("greats", model.training(ATTENTION.__contains__).params)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_router_loads_count_the_tokens_of_each_expert(model, batch, layers):
    found = np.asarray(jax.jit(gate_loads(GateLoads(layers)))(Subject(model), batch, None))
    logits = np.asarray(model.token_losses(batch, Hooks(of_router=lambda logits: logits)).aux["of_router"])
    expected = np.zeros((3, 2, 4))
    for layer, b, t in np.ndindex(*logits.shape[:3]):
        if t < batch.lengths[b]:
            expected[b, layer, np.argsort(-logits[layer, b, t])[:2]] += 1
    np.testing.assert_array_equal(found, expected[:, -1] if layers == "last" else expected)
    np.testing.assert_array_equal(found.sum(-1).ravel()[:: 1 if layers == "last" else 2], 2 * np.asarray(batch.lengths))


def test_loads_of_a_dense_model_and_of_other_layers_are_refused_by_name(batch):
    dense = gradient_model.build(gradient_model.MODEL)
    with pytest.raises(InputError, match="architecture='qwen2' is dense and has no routers"):
        gate_loads(GateLoads())(Subject(dense), batch, None)
    with pytest.raises(ValueError, match="layers"):
        gate_loads(GateLoads("first"))
