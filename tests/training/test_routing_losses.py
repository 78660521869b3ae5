"""The routers' losses in the train step of a mixture of experts: in the loss, in its gradient, over microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax.models import moe
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Scheduled
from dataflex_jax.training.state import TrainState
from dataflex_jax.training.step import TrainStep
from tests.helpers import weighted_step

MIXTURE = dataclasses.replace(
    weighted_step.MODEL,
    architecture="olmoe",
    qk_norm=None,
    num_experts=4,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.5,
    router_z_loss_coef=0.25,
)
RATE = 0.1


@pytest.fixture(scope="module")
def model():
    return jax.jit(Model.random, static_argnums=0)(MIXTURE, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    """Rows of different lengths, padded on the right."""
    lengths = np.linspace(weighted_step.LENGTH, 3, 8).astype(np.int32)
    whole = dataclasses.replace(weighted_step.make_batch(), reference_losses=None)
    mask = whole.mask * (np.arange(weighted_step.LENGTH) < lengths[:, None])
    return dataclasses.replace(whole, mask=mask, lengths=jnp.asarray(lengths))


def routing_loss(model, batch):
    real = batch.real_inputs
    hooks = Hooks(of_router=moe.router_sums(MIXTURE.num_experts_per_tok, real))
    sums, tokens = model.token_losses(batch, hooks).aux["of_router"], real.sum()
    return 0.5 * moe.balancing_loss(sums, tokens) + 0.25 * moe.z_loss(sums, tokens)


def token_mean(model, batch):
    return jnp.sum(batch.mask * model.token_losses(batch).losses) / jnp.sum(batch.mask)


def stepped(model, batch, run=lambda step, *of: jax.jit(step)(*of), **fields):
    mixer, optimizer = Scheduled("static", static(), weighted_step.EVERY_STEP), optax.sgd(RATE)
    step = TrainStep(model.having(None), optimizer, lambda _: RATE, mixer, **fields)
    start = TrainState(
        jnp.int32(0),
        model.params,
        optimizer.init(model.params),
        mixer.policy.init(batch.drawn_with),
        (),
        jax.random.key(1),
    )
    return run(step, start, batch)


def loads_by_hand(model, batch):
    """Of each domain's real tokens, the share that each expert of the last block gets; 0 of a domain without any."""
    logits = np.asarray(model.token_losses(batch, Hooks(of_router=lambda logits: logits)).aux["of_router"])[-1]
    slots = np.zeros((len(batch.drawn_with), 4))
    for b, t in np.ndindex(*logits.shape[:2]):
        if batch.real_inputs[b, t]:
            slots[batch.domain[b], np.argsort(-logits[b, t])[:2]] += 1
    return slots / np.maximum(slots.sum(1, keepdims=True), 1)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_they_are_part_of_the_loss_and_of_its_gradient(model, batch, parts):
    """Of microbatches their mean, which is not that of the whole batch: the losses are products of means."""
    state, metrics = stepped(model, batch, grad_accumulation=parts)

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        found = model.with_params(params)
        each = [routing_loss(found, weighted_step.of_rows(batch, slice(i, None, parts))) for i in range(parts)]
        return token_mean(found, batch) + sum(each) / parts

    loss, gradient = expected(model.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    moved = jax.tree.map(lambda old, slope: old - RATE * slope, model.params, gradient)
    jax.tree.map(lambda new, wanted: np.testing.assert_allclose(new, wanted, atol=2e-6), state.params, moved)
    assert metrics["router_balancing_loss"] > 1.9
    np.testing.assert_allclose(metrics["domain_router_load"], loads_by_hand(model, batch), rtol=1e-6)
    assert metrics["loss"] > token_mean(model, batch) + 0.9


def test_they_are_metrics_and_of_a_dense_model_there_are_none(model, batch):
    _, metrics = stepped(model, batch, run=jax.eval_shape)
    found = {name for name in metrics if "router" in name}
    assert found == {"router_balancing_loss", "router_z_loss", "domain_router_load"}
    assert metrics["domain_router_load"].shape == (len(batch.drawn_with), 4)
    dense, _ = weighted_step.models()
    batch = dataclasses.replace(weighted_step.make_batch(), reference_losses=None)
    _, metrics = stepped(dense, batch, run=jax.eval_shape)
    assert not [name for name in metrics if "router" in name]
