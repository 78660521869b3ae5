"""The training of adapters, on one device and several: what is in the state, and that only rounding changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dataflex_jax import sharding
from dataflex_jax.configs import base as base_config
from dataflex_jax.models import decoder, layout, lora
from dataflex_jax.models.layout import LORA_MODULES
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.training import optim
from dataflex_jax.training.step import Fixed, TrainStep, abstract_state, init_state
from tests.models.test_lora import (
    LORA,
    MODEL,
    adapted,
    assert_close,
    build,
    created,
    graphdef_of,
    mean_loss,
    random_tokens,
    token_losses,
)


def train(cfg, axes=None, accumulation=1, optimizer=None):
    """(state, base) after three steps on rows of two domains; `axes` of the mesh, None: one device."""
    optimizer = optimizer or optax.sgd(0.5)
    mesh = sharding.make_mesh(axes) if axes else sharding.make_mesh({}, jax.devices()[:1])

    def init(key):
        return init_state(cfg, optimizer, static().init(jnp.ones(2) / 2), (), key)

    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(init, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(lambda key: init(key)[1], out_shardings=shardings)(jax.random.key(0))
        base = jax.device_get(lora.split(created(cfg)[1])[0])
        base = jax.device_put(base, layout.param_shardings(mesh, base))
        step = TrainStep(
            graphdef,
            optimizer,
            optax.constant_schedule(0.5),
            static(),
            Schedule(0, 1, -1),
            grad_accumulation=accumulation,
        )
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
        for i in range(3):
            batch = {
                "tokens": random_tokens(rows=8, seed=i),
                "mask": jnp.ones((8, 12)),
                "domain": jnp.arange(8) % 2,
                "drawn_with": jnp.ones(2) / 2,
            }
            state, _ = step(state, jax.device_get(batch), Fixed(frozen=base))
    return state, base


@pytest.fixture(scope="module")
def trained():
    return train(adapted(dropout=0.2))


def up_projection(state):
    return state.params["layers"]["mlp"]["up_proj"]["lora_b"]


def test_the_merged_model_computes_the_same_after_training(trained):
    state, base = trained
    tokens = random_tokens(seed=9)
    got = token_losses(graphdef_of(MODEL), lora.merge(base, state.params, LORA), tokens)
    np.testing.assert_allclose(
        got, token_losses(graphdef_of(adapted()), lora.combine(base, state.params), tokens), atol=1e-5
    )
    assert not np.allclose(got, token_losses(graphdef_of(MODEL), base, tokens), atol=0.01)


def test_nothing_of_the_bases_size_is_in_the_state():
    config = base_config.get_config().optim
    state, _ = train(adapted(), optimizer=optim.adamw(config, optim.learning_rate(config, 10)))
    assert jax.tree.structure(state.params) == jax.tree.structure(lora.split(created(adapted())[1])[1])
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(moments))
    assert [jax.tree.structure(tree) for tree in moments] == 2 * [jax.tree.structure(state.params)]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * adapted().num_lora_params() + 20


def test_weight_decay_acts_on_both_factors():
    config = base_config.get_config().optim
    _, _, adapters = build()
    optimizer = optim.adamw(config, optax.constant_schedule(0.1))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, adapters), optimizer.init(adapters), adapters)
    assert_close(updates, jax.tree.map(lambda leaf: -0.1 * config.weight_decay * leaf, adapters), atol=1e-7)


def test_accumulation_changes_rounding_only_dropout_included(trained):
    accumulated, _ = train(adapted(dropout=0.2), accumulation=4)
    assert_close(accumulated.params, trained[0].params, atol=1e-6)
    without, _ = train(adapted())
    assert not np.allclose(up_projection(without), up_projection(trained[0]), atol=1e-3)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_devices_change_rounding_only_dropout_included(trained, axes):
    state, base = train(adapted(dropout=0.2), axes)
    assert_close(jax.device_get(state.params), jax.device_get(trained[0].params), atol=2e-6)
    kernel = base["layers"]["attention"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / (axes.get("fsdp", 1) * axes.get("tensor", 1))


def test_adapters_are_split_with_their_channels_and_whole_on_fsdp():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = layout.param_shardings(mesh, jax.eval_shape(lambda: lora.init(MODEL, LORA, jax.random.key(0))))
    for module in LORA_MODULES:
        factors = shardings["layers"]["attention" if module in LORA_MODULES[:4] else "mlp"][module]
        along_inputs = module in ("o_proj", "down_proj")
        assert factors["lora_a"].spec == P(None, "tensor" if along_inputs else None, None)
        assert factors["lora_b"].spec == P(None, None, None if along_inputs else "tensor")


def test_frozen_weights_cost_no_gradient():
    """Neither a kernel's nor the embedding's gradient is computed, so a step does less than a full one."""
    cfg = dataclasses.replace(adapted(), vocab_size=2048, hidden_size=64, intermediate_size=256)
    graphdef, shapes = jax.eval_shape(functools.partial(decoder.create, cfg), jax.random.key(0))
    base, adapters = lora.split(shapes)
    tokens = jax.ShapeDtypeStruct((4, 65), jnp.int32)

    def flops(argnum):
        loss = jax.jit(jax.grad(functools.partial(mean_loss, graphdef), argnums=argnum))
        return loss.lower(base, adapters, tokens).compile().cost_analysis()["flops"]

    assert flops(1) < 0.85 * flops(0)
    assert cfg.flops_per_token(64) < 0.8 * dataclasses.replace(cfg, lora=None).flops_per_token(64)


# Telling bases apart.
