"""The train step against plain NumPy and optax on the same model: statistics, accumulation, loss weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.data.batch import Batch
from dataflex_jax.models.model import Model
from dataflex_jax.policies.base import Mixer
from dataflex_jax.policies.mixers.odm import odm
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.training.state import Start, TrainState
from dataflex_jax.training.step import TrainStep, domain_statistics
from tests.helpers import tiny_model

MODEL = dataclasses.replace(tiny_model.MODEL, num_key_value_heads=1)
NUM_DOMAINS = 3
SGD = optax.sgd(0.1)
SHAPE = Model.shape(MODEL)


def make_batch(rng, rows=8, length=12):
    mask = (rng.random((rows, length)) < 0.8).astype(np.float32)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 64, (rows, length + 1)), jnp.int32),
        mask=jnp.asarray(mask),
        lengths=jnp.full(rows, length, jnp.int32),
        domain=jnp.asarray(rng.integers(0, 2, rows), jnp.int32),  # the last domain has no row
        drawn_with=jnp.asarray([0.5, 0.3, 0.2]),
    )


def initial(mixer_state):
    return Start(SHAPE, None, SGD, mixer_state).state(jax.random.key(0))


def train_step(mixer, schedule, accumulation=1):
    scheduled = Scheduled("mixer", mixer, schedule)
    return TrainStep(SHAPE, SGD, optax.constant_schedule(0.1), scheduled, grad_accumulation=accumulation)


def take_step(batch, mixer, accumulation=1):
    """(state before, state after, metrics)."""
    state = initial(mixer.init(jnp.ones(NUM_DOMAINS) / NUM_DOMAINS))
    return state, *jax.jit(train_step(mixer, Schedule(0, 1, -1), accumulation))(state, batch)


def row_losses(params, batch):
    return SHAPE.having(params).token_losses(batch).losses


def test_domain_statistics_are_those_of_a_loop_over_rows():
    rng = np.random.default_rng(0)
    losses, mask = rng.random((6, 5)).astype(np.float32), (rng.random((6, 5)) < 0.6).astype(np.float32)
    mask[5] = 0  # a padded row is no row
    domains = np.array([0, 2, 0, 2, 3, 1])
    batch = Batch(np.zeros((6, 6), np.int32), mask, np.full(6, 5), domains)
    got = domain_statistics(jnp.asarray(losses), jax.tree.map(jnp.asarray, batch), 5)
    for k in range(5):
        rows = [b for b in range(6) if domains[b] == k and mask[b].any()]
        tokens = sum(mask[b].sum() for b in rows)
        loss = sum((mask[b] * losses[b]).sum() for b in rows) / tokens if rows else 0
        assert got.rows[k] == len(rows)
        assert got.tokens[k] == tokens
        np.testing.assert_allclose(got.loss[k], loss, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_a_step_descends_the_token_mean_over_the_whole_batch(accumulation):
    """Whatever the microbatches: their unequal token counts must not change a token's weight."""
    batch = make_batch(np.random.default_rng(1))
    state, after, metrics = take_step(batch, static(), accumulation)

    def objective(params):
        losses = row_losses(params, batch)
        return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)

    loss, gradients = jax.jit(jax.value_and_grad(objective))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    for got, want in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert after.step == 1
    assert metrics["learning_rate"] == np.float32(0.1)


def test_accumulation_does_not_change_what_the_mixer_sees():
    batch = make_batch(np.random.default_rng(2))
    _, once, metrics = take_step(batch, odm())
    _, split, split_metrics = take_step(batch, odm(), 4)
    np.testing.assert_array_equal(metrics["domain_rows"], split_metrics["domain_rows"])
    np.testing.assert_allclose(metrics["domain_loss"], split_metrics["domain_loss"], rtol=1e-5)
    np.testing.assert_allclose(once.mixer.reward, split.mixer.reward, rtol=1e-4)
    assert metrics["domain_rows"][2] == 0
    assert metrics["domain_loss"][2] == 0


def test_every_row_is_credited_to_its_own_domain():
    """The peer credits a mixed batch to the first row's domain."""
    batch = make_batch(np.random.default_rng(3))
    state, _, metrics = take_step(batch, odm())
    losses = np.asarray(row_losses(state.params, batch), np.float64)
    mask, domains = np.asarray(batch.mask), np.asarray(batch.domain)
    for k in range(2):
        rows = domains == k
        np.testing.assert_allclose(
            metrics["domain_loss"][k], (losses[rows] * mask[rows]).sum() / mask[rows].sum(), rtol=1e-5
        )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_weights_reach_the_loss_and_its_gradient(accumulation):
    """In the peer DoReMi's weights never do."""
    batch = make_batch(np.random.default_rng(4))
    weights = jnp.asarray([2.0, 0.25, 1.0])
    weighted = Mixer(
        init=lambda natural: weights,
        update=lambda state, _: state,
        sampling_weights=lambda state: jnp.ones(3) / 3,
        loss_weights=lambda state: state,
    )
    state, after, metrics = take_step(batch, weighted, accumulation)

    def objective(params):
        token_weights = batch.mask * weights[batch.domain][:, None]
        return jnp.sum(token_weights * row_losses(params, batch)) / jnp.sum(token_weights)

    loss, gradients = jax.jit(jax.value_and_grad(objective))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    for got, want in zip(jax.tree.leaves(after.params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert abs(float(metrics["loss"]) - float(take_step(batch, static())[2]["loss"])) > 1e-4


def test_the_observation_counts_from_one_and_knows_the_schedule():
    seen = []

    def update(state, observation):
        seen.append(jax.tree.map(lambda x: x, observation))
        return jnp.stack([observation.step, observation.steps_since_warmup, observation.update])

    mixer = Mixer(
        init=lambda natural: jnp.zeros(3, jnp.int32), update=update, sampling_weights=lambda s: jnp.ones(3) / 3
    )
    state, step = initial(mixer.init(None)), jax.jit(train_step(mixer, Schedule(2, 3, -1)))
    trace = []
    for _ in range(6):
        state, _ = step(state, make_batch(np.random.default_rng(5)))
        trace.append(np.asarray(state.mixer).tolist())
    assert trace == [[1, -1, -1], [2, 0, 0], [3, 1, 0], [4, 2, 0], [5, 3, 1], [6, 4, 1]]
    assert len(seen) == 1  # traced once
    assert seen[0].token_losses.shape == seen[0].mask.shape == (8, 12)


def test_the_state_is_a_pytree_of_arrays_only():
    state, after, _ = take_step(make_batch(np.random.default_rng(7)), odm())
    assert isinstance(after, TrainState)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(after))
