"""Gradients beside directions, and sums of gradients, against materialised ones in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.data.batch import Batch
from dataflex_jax.models import families
from dataflex_jax.models.model import Model
from dataflex_jax.policies.selectors.less import less
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.directions import add_gradient, beside, direction_bytes, no_directions
from dataflex_jax.signals.moments import AdamState, adam_moments
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.rows import named_leaves, selected_paths
from tests.helpers.array_rows import TARGET_GROUPS, TARGET_IDS, TARGET_POOL, signals_of, whole_batch
from tests.helpers.gradient_model import (
    ADAPTED,
    BETAS,
    MODEL,
    adam_by_hand,
    assert_same,
    batch_of,
    build,
    materialised,
    random_moments,
)
from tests.helpers.influences import transcribed

TIED = dataclasses.replace(MODEL, tie_word_embeddings=True)
COUNT = 3
jitted = jax.jit(beside, static_argnums=2)


def paths_of(model, parameters="all"):
    return selected_paths(model.params, None if parameters == "blocks" else lambda path: True)


def random_directions(model, paths):
    rng = np.random.default_rng(2)
    leaves = named_leaves(model.params)
    return {path: jnp.asarray(rng.normal(size=(COUNT, *leaves[path].shape)), jnp.float32) for path in paths}


def flat(tree, paths):
    """float64 [rows, numbers]"""
    parts = [np.asarray(tree[path], np.float64) for path in paths]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def expected(rows, directions):
    norms = np.linalg.norm(rows, axis=1)
    with np.errstate(invalid="ignore"):
        return rows @ directions.T / norms[:, None], norms


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("cfg", [TIED, ADAPTED], ids=["tied", "lora"])
def test_rows_beside_directions_are_as_materialised(cfg, adam):
    """Of all trained parameters; a tied table's gradient is one sum before it is shaped or measured."""
    model, batch = build(cfg), batch_of()
    paths, moments = paths_of(model), random_moments(model.params) if adam else None
    directions, gradients = random_directions(model, paths), materialised(model, batch)
    if adam:
        gradients = {p: adam_by_hand(np.asarray(g, np.float64), moments, p) for p, g in gradients.items()}
    influences, norms = expected(flat(gradients, paths), flat(directions, paths))
    got = jitted(model, batch, paths, directions, moments)
    assert_same(got.influences[:-1], influences[:-1])
    np.testing.assert_allclose(got.norms, norms, rtol=1e-5)
    assert adam or np.isnan(got.influences[-1]).all()  # a row without targets has no direction of its own


@pytest.mark.parametrize("scale", [1e-22, 1e8])
def test_gradients_of_any_length_keep_their_digits(scale):
    model, batch = build(ADAPTED), batch_of()
    paths = paths_of(model)
    directions = random_directions(model, paths)
    influences, norms = expected(flat(materialised(model, batch), paths), flat(directions, paths))

    def loss_scaled(losses, row):
        return scale * jnp.sum(row.mask * losses) / jnp.maximum(jnp.sum(row.mask), 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataflex_jax.signals.directions.row_loss", loss_scaled)
        got = jax.jit(lambda *given: beside(given[0], given[1], paths, given[2]))(model, batch, directions)
    assert_same(got.influences[:-1], influences[:-1])
    np.testing.assert_allclose(np.asarray(got.norms, np.float64), scale * norms, rtol=1e-5)


@pytest.mark.parametrize("cfg", [TIED, ADAPTED], ids=["tied", "lora"])
def test_sums_of_gradients_are_as_materialised(cfg):
    model, batch, weights = build(cfg), batch_of(), np.array([0.5, 0, -2, 7], np.float32)
    paths = paths_of(model)
    start = random_directions(model, paths)
    got = jax.jit(add_gradient)(start, jnp.int32(1), model, batch, weights)
    rows = weights.astype(np.float64) @ flat(materialised(model, batch), paths)
    wanted = flat(start, paths) + (np.arange(COUNT) == 1)[:, None] * rows
    assert_same(flat(got, paths), wanted)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "qwen3" else pytest.mark.slow) for n in families.names()]
)
def test_every_family_is_as_materialised(name):
    window = 5 if name == "mistral" else None
    cfg = dataclasses.replace(MODEL, architecture=name, attention_bias=None, qk_norm=None, sliding_window=window)
    model, batch = build(cfg), batch_of()
    paths = paths_of(model)
    directions = random_directions(model, paths)
    influences, norms = expected(flat(materialised(model, batch), paths), flat(directions, paths))
    got = jitted(model, batch, paths, directions)
    assert_same(got.influences[:-1], influences[:-1])
    np.testing.assert_allclose(got.norms, norms, rtol=1e-5)


@pytest.mark.slow
def test_influences_are_those_of_the_definition():
    """Through the selector: sweeps, targets without a gradient, and both aggregations over the targets."""
    model = build(TIED)
    moments = random_moments(model.params)
    state = optax.ScaleByAdamState(moments.count, moments.mu, moments.nu)
    signals = signals_of(Subject(model, AdamState(state, **BETAS)))
    gradients, targets = (materialised(model, whole_batch(*pool)) for pool in ((), (TARGET_POOL,)))
    rows = {path: adam_by_hand(np.asarray(g, np.float64), moments, path) for path, g in gradients.items()}
    for target_agg in ("mean_of_cos", "cos_of_mean"):
        found, _ = less(projection="exact", target_agg=target_agg, group_agg="mean").score({}, signals, None)
        of_targets = flat(targets, gradients)[list(TARGET_IDS)]
        wanted = transcribed(flat(rows, gradients), of_targets, list(TARGET_GROUPS), target_agg).mean(axis=1)
        np.testing.assert_allclose(found.rows, wanted, rtol=0, atol=1e-5)


def test_no_array_has_every_rows_gradient_of_all_layers():
    """Neither the rows' gradients nor those of several layers of one parameter: traced, not compiled."""
    rows, length, layers = 8, 6, 5
    cfg = dataclasses.replace(TIED, num_hidden_layers=layers, remat="none")
    model = jax.eval_shape(functools.partial(Model.random, cfg), jax.random.key(0))
    moments = adam_moments(jax.eval_shape(optax.adam(0.1).init, model.params), **BETAS)
    per_row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens, mask = (
        jax.ShapeDtypeStruct((rows, n), dtype) for n, dtype in ((length + 1, jnp.int32), (length, jnp.float32))
    )
    paths = paths_of(model)
    directions = {
        path: jax.ShapeDtypeStruct((COUNT, *leaf.shape), jnp.float32)
        for path, leaf in named_leaves(model.params).items()
    }
    batch = Batch(tokens=tokens, mask=mask, lengths=per_row, domain=per_row)
    traced = jax.make_jaxpr(lambda *given: beside(given[0], given[1], paths, *given[2:]))(
        model, batch, directions, moments
    )
    shapes = {tuple(var.aval.shape) for eqn in _equations(traced.jaxpr) for var in eqn.outvars}
    kernel = cfg.linear_widths()["up_proj"]
    assert (rows, *kernel) in shapes  # one layer's
    assert not {shape for shape in shapes if shape[-2:] == kernel and np.prod(shape[:-2]) > max(rows, COUNT * layers)}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from _equations(getattr(inner, "jaxpr", inner))


def test_directions_are_split_like_the_parameters_and_counted_so():
    model = build(MODEL)
    paths = paths_of(model, "blocks")
    numbers = sum(leaf.size for path, leaf in named_leaves(model.params).items() if path in paths)
    largest = max(np.prod(shape) for shape in MODEL.linear_widths().values())
    one = make_mesh({}, jax.devices()[:1])
    assert direction_bytes(one, model.params, paths) == 4 * (numbers + largest)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert direction_bytes(mesh, model.params, paths) == 4 * (numbers // 8 + largest)
    with jax.set_mesh(mesh):
        directions = no_directions(mesh, model.params, paths, 2)
    assert directions.keys() == set(paths)
    up = directions["layers/mlp/up_proj/kernel"]
    assert up.shape == (2, 2, 16, 24)
    assert up.sharding.shard_shape(up.shape) == (2, 2, 4, 12)


def test_a_share_of_a_devices_memory_is_for_directions():
    model = build(MODEL)
    mesh = make_mesh({}, jax.devices()[:1])
    of = signals_of(Subject(model))
    blocks, everything = (direction_bytes(mesh, model.params, paths_of(model, p)) for p in ("blocks", "all"))
    memory = of._asked[1].device_memory
    assert (
        of.room_for_directions() == memory // 4 // blocks > of.room_for_directions("all") == memory // 4 // everything
    )
