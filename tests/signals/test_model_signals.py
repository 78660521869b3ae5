"""The project's own signals through real sweeps, against the model's whole batch and materialised gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import (
    Alignments,
    Embeddings,
    GradientNorms,
    Gradients,
    Losses,
    Preconditioner,
    Projection,
)
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject, row_function
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.signals.rows import named_leaves, selected_paths
from dataflex_jax.signals.sweep import Sweeper, source
from tests.helpers.array_rows import POOL, TARGET_IDS, TARGET_POOL, signals_of, whole_batch
from tests.helpers.gradient_model import (
    ADAPTED,
    BETAS,
    MODEL,
    adam_by_hand,
    assert_same,
    build,
    materialised,
    random_moments,
)

SOME = np.array([6, 2, 7])
WITHOUT_TARGETS = [4, 8]


def flat(gradients, paths):
    """float64 [rows, numbers], of the parameters `paths` in their order."""
    parts = [np.asarray(gradients[path], np.float64) for path in gradients if path in paths]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def swept(signals, signal, operand=None):
    """The signal of all candidates; a sweep over some of them gives the same."""
    found = signals.candidates.sweep(signal, operand=operand)
    assert len(found) == POOL.num_rows
    assert_same(signals.candidates.sweep(signal, SOME, operand), found[SOME])
    return found


def test_losses_are_means_over_the_rows_targets():
    model, batch = build(MODEL), whole_batch()
    losses, counts = np.asarray(model.token_losses(batch).losses, np.float64), batch.mask.sum(axis=1)
    with np.errstate(invalid="ignore"):
        expected = (batch.mask * losses).sum(axis=1) / counts
    found = signals_of(Subject(model)).candidates.sweep(Losses())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found)), WITHOUT_TARGETS)


def mean(hidden, real):
    return jnp.sum(hidden * real[:, :, None], axis=1) / jnp.sum(real, axis=1, keepdims=True)


def test_embeddings_are_of_the_hidden_states_without_padding():
    model, batch = build(MODEL), whole_batch()
    hidden = np.asarray(model.hidden_states(batch), np.float64)
    expected = [states[:n].mean(axis=0) for states, n in zip(hidden, batch.lengths, strict=True)]
    signals = signals_of(Subject(model))
    assert_same(swept(signals, Embeddings(mean)), expected)
    assert_same(swept(signals, Embeddings(mean, then=scaled), np.float32(3)), 3 * np.asarray(expected))


DEEP = dataclasses.replace(MODEL, num_hidden_layers=4)


def mean_direction(hidden, real):
    """Of states scaled to length 1, as a final norm with scales of 1 leaves their directions."""
    return mean(hidden / jnp.linalg.norm(hidden, axis=2, keepdims=True), real)


@pytest.mark.parametrize(("layers", "numbers"), [((-1, 1, -2), [4, 1, 3]), (2, [1, 3]), (9, [1, 2, 3, 4])], ids=str)
def test_embeddings_of_some_layers_are_those_of_models_that_end_there(layers, numbers):
    model, batch = build(DEEP), whole_batch()
    expected = []
    for number in numbers:
        first = jax.tree.map(lambda stacked, n=number: stacked[:n], model.params["layers"])
        cut = Model.shape(dataclasses.replace(DEEP, num_hidden_layers=number))
        hidden = jax.jit(Model.hidden_states)(cut.having({**model.params, "layers": first}), batch)
        expected.append(mean_direction(hidden, batch.real_inputs))
    signals = signals_of(Subject(model))
    found = swept(signals, Embeddings(mean_direction, layers=layers))
    assert found.shape == (POOL.num_rows, len(numbers), DEEP.hidden_size)
    assert_same(found, np.stack(expected, axis=1))
    assert_same(swept(signals, Embeddings(mean_direction, then=scaled, layers=layers), np.float32(3)), 3 * found)


def test_no_more_than_one_layers_hidden_states_are_kept():
    model, batch = build(DEEP), jax.tree.map(jnp.asarray, whole_batch())
    function = row_function(Embeddings(mean, layers=(1, 3)))
    program = str(jax.make_jaxpr(lambda model: function((Subject(model), None), batch))(model))
    rows, tokens = batch.mask.shape
    assert f"[{rows},{tokens},{DEEP.hidden_size}]" in program
    assert f"[{DEEP.num_hidden_layers},{rows},{tokens},{DEEP.hidden_size}]" not in program


def test_embeddings_of_some_layers_on_eight_devices():
    mesh, model = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), build(DEEP)
    signal = Embeddings(mean, layers=(1, -1))
    expected = signals_of(Subject(model)).candidates.sweep(signal)
    with jax.set_mesh(mesh):
        split = model.having(jax.device_put(model.params, param_shardings(mesh, model.params)))
        found = ModelSignals(Subject(split), Sweeper(mesh, rows=4), source(POOL, mesh)).candidates.sweep(signal)
    assert_same(found, expected)


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_a_layer_that_there_is_not_is_named(layer):
    line = rf"^layer {layer} is asked for, but the model has 4; layers from 1 to 4, or from -1 \(the last\) to -4, are"
    with pytest.raises(InputError, match=line):
        signals_of(Subject(build(DEEP))).candidates.sweep(Embeddings(mean, layers=(1, layer)))


def scaled(features, operand):
    return features * operand


def test_gradients_are_preconditioned_by_the_moments_and_may_be_reduced():
    model, rng = build(ADAPTED), np.random.default_rng(5)
    moments = random_moments(model.params, eps_mode="inside", bias_correction=True)
    state = optax.ScaleByAdamState(moments.count, moments.mu, moments.nu)
    signals = signals_of(Subject(model, AdamState(state, **BETAS)))
    gradients = materialised(model, whole_batch())
    paths, scale = list(gradients), rng.uniform(1, 2, ()).astype(np.float32)
    steps = {path: adam_by_hand(np.asarray(g, np.float64), moments, path) for path, g in gradients.items()}
    exact = Projection("none")
    assert_same(swept(signals, Gradients(exact)), flat(gradients, paths))
    wanted = Gradients(exact, Preconditioner("inside", True), then=scaled)
    assert_same(swept(signals, wanted, scale), scale * flat(steps, paths))
    targets = materialised(model, whole_batch(TARGET_POOL))
    assert_same(signals.targets.sweep(Gradients(exact)), flat(targets, paths)[list(TARGET_IDS)])


def test_gradients_are_of_the_blocks_or_of_all_that_is_trained():
    model = build(dataclasses.replace(MODEL, tie_word_embeddings=True))
    signals, gradients = signals_of(Subject(model)), materialised(model, whole_batch())
    blocks = selected_paths(model.params)
    assert set(blocks) < set(gradients)
    for parameters, paths in (("blocks", blocks), ("all", list(gradients))):
        found = signals.candidates.sweep(Gradients(Projection("none"), parameters=parameters))
        assert_same(found, flat(gradients, paths))
    with pytest.raises(ValueError, match=r"^parameters = 'head': must be one of blocks, all"):
        signals.candidates.sweep(Gradients(Projection("none"), parameters="head"))


@pytest.mark.parametrize("cfg", [MODEL, ADAPTED], ids=["full", "lora"])
def test_norms_are_those_of_the_linear_layers_gradients(cfg):
    model = build(cfg)
    gradients = flat(materialised(model, whole_batch()), selected_paths(model.params))
    found = swept(signals_of(Subject(model)), GradientNorms())
    np.testing.assert_allclose(found, np.linalg.norm(gradients, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(found == 0), WITHOUT_TARGETS)


@pytest.mark.parametrize(
    "cfg", [dataclasses.replace(MODEL, tie_word_embeddings=True), ADAPTED], ids=["full, tied", "lora"]
)
def test_alignments_are_the_gradients_inner_products_with_every_direction(cfg):
    """Of all trained parameters, those outside the layers too."""
    model, rng, count = build(cfg), np.random.default_rng(2), 3
    directions = jax.tree.map(lambda x: rng.normal(size=(count, *x.shape)).astype(np.float32), model.params)
    gradients = materialised(model, whole_batch())
    along = flat(named_leaves(directions), gradients)
    expected = flat(gradients, gradients) @ along.T
    found = swept(signals_of(Subject(model)), Alignments(), directions)
    assert found.shape == (POOL.num_rows, count)
    for g in range(count):
        assert_same(found[:, g], expected[:, g])
    # Different directions tell rows apart differently.
    assert np.linalg.matrix_rank(expected, tol=1e-3 * np.abs(expected).max()) == count
    assert not np.any(found[WITHOUT_TARGETS])


def test_adam_without_its_state_is_refused():
    wanted = Gradients(Projection("sketch", 8), Preconditioner())
    with pytest.raises(InputError, match=r"^there is no Adam state to precondition the gradients with: give"):
        signals_of(Subject(build(MODEL))).candidates.sweep(wanted)
