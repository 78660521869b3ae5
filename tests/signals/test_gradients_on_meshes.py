"""Per-example gradients on eight devices: the same numbers, and what is sent (see tests/test_sharding.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import on_devices
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.policies.signals import Projection
from dataflex_jax.sharding import batch_sharding, make_mesh
from dataflex_jax.signals.gradients import directional_derivatives, gradient_features, gradient_norms
from tests.helpers.gradient_model import ADAPTED, MODEL, assert_same, batch_of, build, random_moments
from tests.test_sharding import MESHES, collectives

WIDE = dataclasses.replace(MODEL, hidden_size=32, intermediate_size=72, vocab_size=64, num_hidden_layers=3)
LAYER_SHAPES = {(32, 16), (32, 8), (16, 32), (32, 72), (72, 32)}
HEAD_SHAPES = {(32, 64), (64, 32)}


def compile_on_mesh(function, mesh, cfg, batch, moments=None):
    """(compiled, its sharded arguments)"""
    model = build(cfg)
    params, frozen, moments = (
        jax.device_put(tree, param_shardings(mesh, tree)) for tree in (model.params, model.frozen, moments)
    )
    arguments = (model.having(params, frozen), on_devices(mesh, jax.device_get(batch)))
    arguments += () if moments is None else (moments,)
    return jax.jit(function).lower(*arguments).compile(), arguments


@pytest.mark.parametrize(
    ("mesh_name", "method", "cfg"),
    [
        ("fsdp", "sketch", WIDE),
        pytest.param("all", "sketch", WIDE, marks=pytest.mark.slow),
        pytest.param("all", "kronecker", WIDE, marks=pytest.mark.slow),
        pytest.param("fsdp", "sketch", ADAPTED, marks=pytest.mark.slow),
        pytest.param("all", "kronecker", ADAPTED, marks=pytest.mark.slow),
    ],
)
def test_devices_change_rounding_only_and_gather_weights_only(mesh_name, method, cfg):
    model, batch = build(cfg), batch_of(rows=16)
    moments = random_moments(model.params) if method == "sketch" else None
    features, mesh = gradient_features(Projection(method, 60)), make_mesh(MESHES[mesh_name])
    expected = jax.jit(features)(model, batch, moments)
    with jax.set_mesh(mesh):
        step, arguments = compile_on_mesh(features, mesh, cfg, batch, moments)
        got = step(*arguments)
    assert got.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert_same(got, expected)
    if mesh_name != "fsdp" or cfg != WIDE:
        return
    found = collectives(step.as_text())
    assert {kind for kind, _, _ in found} == {"all-gather"}
    gathers = [(shape, name) for _, shapes, name in found for _, shape in shapes]
    assert {shape for shape, _ in gathers} == LAYER_SHAPES | HEAD_SHAPES
    # One layer's weights, and in the backward pass its moments.
    assert all("while/body" in name for shape, name in gathers if shape in LAYER_SHAPES)
    # No device has all layers' weights or moments, or other devices' rows.
    text = step.as_text()
    assert "[3,32,72]" not in text
    assert "[2,32,72]" in text or "[2,72,32]" in text
    assert "[16,32,72]" not in text
    assert "[16,72,32]" not in text


def test_norms_and_directional_derivatives_on_a_mesh():
    model, batch, mesh = build(WIDE), batch_of(rows=16), make_mesh(MESHES["all"])
    direction = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=(2, *x.shape)), x.dtype), model.params
    )
    norms = gradient_norms()
    expected = jax.jit(norms)(model, batch), jax.jit(directional_derivatives)(model, batch, direction)
    with jax.set_mesh(mesh):
        step, arguments = compile_on_mesh(norms, mesh, WIDE, batch)
        got = step(*arguments)
        step, arguments = compile_on_mesh(directional_derivatives, mesh, WIDE, batch, direction)
        along = step(*arguments)
    np.testing.assert_allclose(got, expected[0], rtol=1e-5)
    np.testing.assert_allclose(along, expected[1], atol=1e-5 * np.abs(expected[1]).max())
