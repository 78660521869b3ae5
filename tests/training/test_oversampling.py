"""Rows that are drawn, compared with the target set, and kept: on any mesh, in any number of microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.data.listed import ListedRows
from dataflex_jax.data.rows import Row
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.policies.base import Online, Selector
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.selectors.greats import greats
from dataflex_jax.policies.selectors.rho_loss import rho_loss
from dataflex_jax.sharding import batch_sharding, make_mesh, replicated
from dataflex_jax.signals.sweep import source
from dataflex_jax.training.oversampling import Oversampling, TargetDraws, check_compared, compared
from dataflex_jax.training.state import Fixed, TrainState
from dataflex_jax.training.step import TrainStep
from tests.helpers import gradient_model
from tests.helpers.weighted_step import EVERY_STEP, LEARNING_RATE, MODEL, NUM_DOMAINS, SGD, make_batch, models, of_rows

KEPT, DRAWN = 8, 16
SOME = ["greats", pytest.param("rho_loss", marks=pytest.mark.slow)]
SELECTORS = {"greats": greats(), "rho_loss": rho_loss(reference="a run")}


@functools.cache
def drawn():
    """A batch with targets beside it, of which one has nothing to predict."""
    targets = make_batch(seed=3, rows=8)
    targets = dataclasses.replace(targets, mask=targets.mask.at[-1].set(0.0), drawn_with=None, reference_losses=None)
    return dataclasses.replace(make_batch(rows=DRAWN), targets=targets)


def take_step(selector, batch, accumulation=1, mesh=None):
    """(the state after, the metrics) of one step."""
    oversampling = Oversampling(Scheduled("mine", selector, EVERY_STEP), KEPT, accumulation)
    step = TrainStep(
        Model.shape(MODEL),
        SGD,
        optax.constant_schedule(LEARNING_RATE),
        Scheduled("static", static(), EVERY_STEP),
        grad_accumulation=accumulation,
        oversampling=oversampling,
    )
    params = models()[0].params
    mixer = static().init(jnp.ones(NUM_DOMAINS) / NUM_DOMAINS)
    state = TrainState(jnp.int32(0), params, SGD.init(params), mixer, (), jax.random.key(1))
    fixed = Fixed(reference=models()[1] if batch.reference_losses is None else None)
    if mesh is None:
        return jax.device_get(jax.jit(step)(state, batch, fixed))
    with jax.set_mesh(mesh):
        shardings = param_shardings(mesh, state)
        rows = jax.device_put(batch.rows_alone(), batch_sharding(mesh))
        targets = jax.device_put(batch.targets, batch_sharding(mesh))
        batch = dataclasses.replace(
            rows, drawn_with=jax.device_put(batch.drawn_with, replicated(mesh)), targets=targets
        )
        jitted = jax.jit(step, out_shardings=(shardings, replicated(mesh)))
        return jax.device_get(jitted(jax.device_put(state, shardings), batch, fixed))


@functools.cache
def whole(name):
    return take_step(SELECTORS[name], drawn())


def chosen_by_hand(name):
    """Places that the definition keeps, in float64 of whole gradients."""
    batch, model = drawn(), models()[0]
    if name == "rho_loss":
        losses = np.asarray(jax.jit(model.token_losses)(batch).losses, np.float64)
        excess = (np.asarray(batch.mask) * (losses - np.asarray(batch.reference_losses))).sum(1)
        return np.sort(np.argsort(-excess / np.asarray(batch.mask).sum(1), kind="stable")[:KEPT])
    rows, targets = (by_matrix(each) for each in (batch.rows_alone(), batch.targets))
    target = targets[:-1].mean(axis=0)
    scores, taken = LEARNING_RATE * rows @ target, []
    for _ in range(KEPT):
        best = max(set(range(DRAWN)) - set(taken), key=lambda i: (scores[i], -i))
        taken.append(best)
        scores = scores - LEARNING_RATE**2 * rows @ rows[best]
    assert set(taken) != set(np.argsort(-(rows @ target))[:KEPT].tolist()), "the second order must matter"
    return np.sort(taken)


def by_matrix(batch):
    """Each row's gradients of the blocks' matrices, float64 [B, P]."""
    found = gradient_model.materialised(models()[0], dataclasses.replace(batch, reference_losses=None))
    kept = [np.asarray(g, np.float64) for path, g in found.items() if path.endswith("kernel") and "layers/" in path]
    return np.concatenate([g.reshape(len(g), -1) for g in kept], axis=1)


def assert_same(ours, expected):
    (state, metrics), (wanted, figures) = ours, expected
    np.testing.assert_allclose(metrics["loss"], figures["loss"], rtol=1e-5)
    np.testing.assert_array_equal(metrics["domain_rows"], figures["domain_rows"])
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", SELECTORS)
def test_it_trains_on_the_rows_that_the_definition_keeps_and_on_nothing_else(name):
    places = chosen_by_hand(name)
    alone = take_step(SELECTORS[name], of_rows(drawn(), places))
    assert_same(whole(name), alone)
    kept, all_rows = (np.bincount(drawn().domain[rows], minlength=NUM_DOMAINS) for rows in (places, slice(None)))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(whole(name)[1]["domain_kept"], kept / all_rows)
    assert "domain_kept" not in alone[1]


@pytest.mark.parametrize("name", SOME)
def test_the_choice_does_not_depend_on_accumulation(name):
    assert_same(take_step(SELECTORS[name], drawn(), 4), whole(name))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SOME)
def test_the_choice_does_not_depend_on_the_devices(name, axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    assert_same(take_step(SELECTORS[name], drawn(), mesh=make_mesh(axes, devices)), whole(name))


def test_the_reference_may_run_in_the_step():
    assert_same(
        take_step(SELECTORS["rho_loss"], dataclasses.replace(drawn(), reference_losses=None)), whole("rho_loss")
    )


@pytest.mark.parametrize(
    "cfg",
    [pytest.param(gradient_model.MODEL, marks=pytest.mark.slow), gradient_model.ADAPTED],
    ids=["full", "lora"],
)
def test_inner_products_are_those_of_whole_gradients(cfg):
    """Of rows and targets of other lengths, without any gradient being formed for it."""
    model, rows = gradient_model.build(cfg), gradient_model.batch_of(5, 12)
    targets = gradient_model.batch_of(4, 9, seed=1)

    def matrices(batch):
        found = gradient_model.materialised(model, batch)
        kept = [np.asarray(g, np.float64) for path, g in found.items() if path.startswith("layers/") and g.ndim == 4]
        return np.concatenate([g.reshape(len(g), -1) for g in kept], axis=1)

    token_losses, gram, along = jax.jit(compared)(model, rows, targets)
    of_rows_, of_targets = matrices(rows), matrices(targets)
    scale = np.abs(of_rows_ @ of_rows_.T).max()
    np.testing.assert_allclose(gram, of_rows_ @ of_rows_.T, atol=1e-5 * scale)
    np.testing.assert_allclose(along, of_rows_ @ of_targets[:-1].mean(axis=0), atol=1e-5 * scale)
    np.testing.assert_allclose(token_losses, model.token_losses(rows).losses, rtol=1e-5)


@pytest.mark.slow
def test_packed_rows_are_compared_with_targets_that_are_not():
    """Each row's gradient as that of the row alone, whose examples do not see each other."""
    cfg = gradient_model.ADAPTED
    model, rows = gradient_model.build(cfg), gradient_model.batch_of(5, 12)
    ids = jnp.where(jnp.arange(12) < 5, 1, 2) * rows.real_inputs.astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.where(jnp.arange(12) < 5, jnp.arange(12), jnp.arange(12) - 5), ids.shape)
    packed = dataclasses.replace(rows, segment_ids=ids, positions=positions)
    targets = gradient_model.batch_of(4, 9, seed=1)
    token_losses, gram, along = jax.jit(compared)(model, packed, targets)
    of_rows_, of_targets = (
        np.concatenate([np.asarray(g, np.float64).reshape(len(g), -1) for g in found.values()], axis=1)
        for found in (gradient_model.materialised(model, packed), gradient_model.materialised(model, targets))
    )
    scale = np.abs(of_rows_ @ of_rows_.T).max()
    np.testing.assert_allclose(gram, of_rows_ @ of_rows_.T, atol=1e-5 * scale)
    np.testing.assert_allclose(along, of_rows_ @ of_targets[:-1].mean(axis=0), atol=1e-5 * scale)
    np.testing.assert_allclose(token_losses, model.token_losses(packed).losses, rtol=1e-5)
    assert np.abs(np.asarray(token_losses) - model.token_losses(rows).losses).max() > 1e-3


def test_a_selector_of_ones_own_sees_the_rows_and_its_place_is_the_drawn_order():
    seen = []

    def last_first(rows, num):
        seen.append(rows)
        return jnp.arange(rows.losses.shape[0])[::-1][:num]

    mine = Selector(score=None, choose=None, online=Online(last_first))
    assert_same(take_step(mine, drawn()), take_step(mine, of_rows(drawn(), np.arange(DRAWN - KEPT, DRAWN))))
    assert seen[0].gradients is None
    assert seen[0].reference_losses is None


def test_rows_are_drawn_for_it_once_it_is_at_work():
    of = Oversampling(Scheduled("greats", greats(oversample=3), Schedule(2, 1, 2)), 4)
    assert [of.drawn(step) for step in range(1, 7)] == [4, 4, 12, 12, 4, 4]


def test_every_step_has_the_next_rows_of_the_target_set():
    rows = ListedRows([Row(np.full(5, number, np.int32), np.ones(4, bool)) for number in range(7)])
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    pool = rows.pool()
    targets = TargetSet(pool, np.arange(1, 7), np.zeros(6, int), ("all",))

    def first_tokens(number, count):
        batch = TargetDraws(targets, source(pool, mesh), count, 1, mesh).load(number)
        assert batch.num_rows % 4 == 0
        return np.asarray(batch.tokens)[np.asarray(batch.row_tokens) > 0, 0].tolist()

    epoch = first_tokens(1, 3) + first_tokens(2, 3)
    assert sorted(epoch) == [1, 2, 3, 4, 5, 6]
    assert first_tokens(2, 3) == epoch[3:] != first_tokens(4, 3)
    assert sorted(first_tokens(5, 100)) == [1, 2, 3, 4, 5, 6]


def test_gradients_of_no_linear_layer_are_refused_by_name():
    model = models()[0].training(lambda path: path.endswith("scale"))
    with pytest.raises(InputError, match="'greats' compares gradients of the blocks' linear layers") as error:
        check_compared("greats", model.params)
    assert error.value.option == "model.trainable"
