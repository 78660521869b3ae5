"""What weighting the loss does to the train step: its gradient and its scale, however the batch is cut and placed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies.common.anchors import TOKENS
from dataflex_jax.policies.weighters.adapt import adapt
from dataflex_jax.policies.weighters.joint_update_aware import joint_update_aware
from dataflex_jax.training import objective
from dataflex_jax.training.objective import Forward
from dataflex_jax.training.state import Fixed
from dataflex_jax.training.step import dropout_keys
from tests.helpers.hidden_states import pooled
from tests.helpers.weighted_step import (
    LEARNING_RATE,
    LENGTH,
    NUM_DOMAINS,
    POLICIES,
    Policies,
    forward,
    initial,
    make_batch,
    models,
    of_rows,
    take_sharded_step,
    take_step,
    train_step,
)

OF_STATE = ("mixer", "params")
HOW = ("position_weighted_mean", "last_token", "mean")


@functools.cache
def whole(name):
    """(state after, metrics) of the step on the batch in one piece."""
    return take_step(POLICIES[name], make_batch())


@jax.jit
def loss_and_gradients(model, batch, weights):
    loss, gradients = jax.value_and_grad(lambda model: jnp.sum(weights * forward(model, batch)[0]))(model)
    return loss, gradients.params


def assert_same_step(after, metrics, name):
    expected, expected_metrics = whole(name)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    for part in OF_STATE:
        ours, theirs = (jax.tree.leaves(getattr(state, part)) for state in (after, expected))
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
    for figure in ("example_weight_min", "example_weight_max", "example_weight_mean"):
        assert (figure in metrics) == bool(POLICIES[name].weighters)
        if figure in metrics:
            np.testing.assert_allclose(metrics[figure], expected_metrics[figure], rtol=1e-4, atol=1e-6)


# One of each kind of weight; the others take the same way through the step.
QUICK = ("static", "loss", "doremi, loss+adapt")
SOME = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in POLICIES]


@pytest.mark.parametrize("name", POLICIES)
def test_the_gradient_takes_the_weights_as_numbers(name):
    batch, before = make_batch(), initial(POLICIES[name])
    after, metrics = whole(name)
    losses, weights = numbers(POLICIES[name], before, batch)
    loss, gradients = loss_and_gradients(models()[0], batch, weights)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, before.params, gradients)
    for got, want in zip(jax.tree.leaves(after.params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    mean = np.sum(batch.mask * losses) / np.sum(batch.mask)
    if name != "static":
        assert abs(metrics["loss"] - mean) > 1e-3


def numbers(policies, before, batch):
    """The token losses, and their weights in the loss under what the mixer made of the batch."""
    losses, hidden = jax.device_get(forward(models()[0], batch))
    state = before.mixer
    if policies.mixer.loss_weights is not None:
        excess = np.maximum(losses - batch.reference_losses, 0) * batch.mask
        members = np.asarray(batch.domain)[:, None] == np.arange(NUM_DOMAINS)
        present = members.any(axis=0)
        tokens = (members * np.sum(batch.mask, axis=1)[:, None]).sum(axis=0)
        lam = (members * excess.sum(axis=1)[:, None]).sum(axis=0) / np.maximum(tokens, 1)
        raised = np.exp(np.where(present, lam, lam[present].mean())) / len(lam)
        alpha = (1 - 1e-3) * raised / raised.sum() + 1e-3 / len(lam)
        state = state._replace(alpha=jnp.asarray(alpha, jnp.float32))
    scheduled = policies.scheduled()
    seen = Forward(losses, objective.embeddings(scheduled, hidden, batch), batch.reference_losses)
    weights = objective.weigh(
        policies.mixer, scheduled, state, before.weighters, batch, seen, jnp.int32(1), jax.random.key(0)
    )
    return losses, weights.tokens


@pytest.mark.parametrize("name", SOME)
def test_the_step_does_not_depend_on_how_often_the_batch_is_repeated(name):
    batch = make_batch()
    after, metrics = take_step(POLICIES[name], of_rows(batch, np.tile(np.arange(8), 2)))
    assert_same_step(after, metrics, name)


@pytest.mark.parametrize("name", SOME)
def test_the_step_does_not_depend_on_accumulation(name):
    after, metrics = take_step(POLICIES[name], make_batch(), 4)
    assert_same_step(after, metrics, name)


@pytest.mark.parametrize("name", SOME)
def test_the_step_does_not_depend_on_the_devices(name):
    after, metrics = take_sharded_step(POLICIES[name], make_batch())
    assert_same_step(after, metrics, name)


def test_weighing_over_microbatches_is_the_mean_of_their_steps():
    policies, batch = POLICIES["loss"], make_batch()
    after, metrics = take_step(policies, batch, 2, microbatches=True)
    parts = [take_step(policies, of_rows(batch, slice(part, None, 2))) for part in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean([of_part["loss"] for _, of_part in parts]), rtol=1e-5)
    leaves = [jax.tree.leaves(state.params) for state in (after, *(state for state, _ in parts))]
    for got, *of_parts in zip(*leaves, strict=True):
        np.testing.assert_allclose(got, np.mean(of_parts, axis=0), atol=1e-6)
    assert abs(float(metrics["loss"]) - whole("loss")[1]["loss"]) > 1e-3
    assert float(metrics["example_weight_mean"]) == pytest.approx(1)


def test_weighing_over_microbatches_takes_the_mixers_weights_of_the_last_step():
    policies, batch = POLICIES["doremi"], make_batch()
    after, metrics = take_step(policies, batch, 2, microbatches=True)
    before = initial(policies)
    losses = numbers(policies, before, batch)[0]
    factors = np.asarray(before.mixer.alpha / before.mixer.sampling)[batch.domain][:, None] * batch.mask
    parts = [(factors[part::2] * losses[part::2]).sum() / factors[part::2].sum() for part in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean(parts), rtol=1e-5)
    np.testing.assert_allclose(after.mixer.alpha, whole("doremi")[0].mixer.alpha, atol=1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
def test_what_of_a_row_a_weighter_embeds(tokens):
    """All its tokens, or all but the last, without padding; the losses stay those of training."""
    model, lengths = models()[0], np.array([12, 12, 9, 7, 3, 12, 1, 5])
    batch = make_batch()
    mask = batch.mask * (np.arange(LENGTH) < lengths[:, None])
    batch = dataclasses.replace(batch, mask=mask, lengths=jnp.asarray(lengths, jnp.int32))
    made = (adapt(tokens=tokens), joint_update_aware(tokens=tokens), joint_update_aware(pooling="mean"))
    step = train_step(Policies(weighters=tuple((weighter, None) for weighter in made)))
    keys = dropout_keys(jax.random.key(0), jnp.int32(0), batch.num_rows)
    _, found, _ = jax.jit(step._forward)(model.params, Fixed(), batch, keys)
    np.testing.assert_allclose(found.token_losses * mask, forward(model, batch)[0] * mask, rtol=1e-5)
    longer = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), (batch.tokens, mask))
    hidden = np.asarray(forward(model, dataclasses.replace(batch, tokens=longer[0], mask=longer[1]))[1], np.float64)
    for ours, how, more in zip(found.embeddings, HOW, (tokens == "all", tokens == "all", False), strict=True):
        real = np.arange(LENGTH + 1) < lengths[:, None] + more
        np.testing.assert_allclose(ours, pooled(hidden, real, how), atol=1e-5)
