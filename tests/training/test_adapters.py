"""The training of adapters, on one device and several: what is in the state, and that only rounding changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dataflex_jax import sharding
from dataflex_jax.configs import base as base_config
from dataflex_jax.data.batch import on_devices
from dataflex_jax.models import layout, parts
from dataflex_jax.models.model import Model
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.training import optim
from dataflex_jax.training.state import Fixed, Start
from dataflex_jax.training.step import TrainStep
from tests.helpers.tiny_model import MODEL, adapted, assert_close, batch_of, build, created, random_tokens, token_losses


def train(cfg, axes=None, accumulation=1, optimizer=None):
    """(state, frozen parameters) after three steps on rows of two domains; `axes` of the mesh, None: one device."""
    optimizer = optimizer or optax.sgd(0.5)
    mesh = sharding.make_mesh(axes) if axes else sharding.make_mesh({}, jax.devices()[:1])
    model = Model.shape(cfg)
    start = Start(model, parts.is_adapter, optimizer, static().init(jnp.ones(2) / 2))
    with jax.set_mesh(mesh):
        abstract = start.abstract(mesh)
        state = start.placed(jax.random.key(0), abstract)
        frozen = jax.device_get(created(cfg).frozen)
        frozen = jax.device_put(frozen, layout.param_shardings(mesh, frozen))
        mixer = Scheduled("static", static(), Schedule(0, 1, -1))
        step = TrainStep(model, optimizer, optax.constant_schedule(0.5), mixer, grad_accumulation=accumulation)
        outputs = sharding.shardings(abstract), sharding.replicated(mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        for i in range(3):
            batch = jax.device_get(batch_of(random_tokens(rows=8, seed=i), drawn_with=jnp.ones(2) / 2))
            state, _ = step(state, on_devices(mesh, batch), Fixed(frozen=frozen))
    return state, frozen


@pytest.fixture(scope="module")
def trained():
    return train(adapted(dropout=0.2))


def up_projection(state):
    return state.params["layers"]["mlp"]["up_proj"]["lora_b"]


def test_the_merged_model_computes_the_same_after_training(trained):
    state, frozen = trained
    tokens = random_tokens(seed=9)
    model = Model.shape(adapted()).having(state.params, frozen)
    got = token_losses(model.without_adapters(), tokens)
    np.testing.assert_allclose(got, token_losses(model, tokens), atol=1e-5)
    assert not np.allclose(got, token_losses(Model.shape(MODEL).having(frozen), tokens), atol=0.01)


def test_nothing_of_the_bases_size_is_in_the_state():
    config = base_config.get_config().optim
    state, _ = train(adapted(), optimizer=optim.adamw(config, optim.learning_rate(config, 10)))
    assert jax.tree.structure(state.params) == jax.tree.structure(created(adapted()).params)
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(moments))
    assert [jax.tree.structure(tree) for tree in moments] == 2 * [jax.tree.structure(state.params)]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * adapted().num_lora_params() + 20


def test_weight_decay_acts_on_both_factors():
    config = base_config.get_config().optim
    adapters = build().params
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
    state, frozen = train(adapted(dropout=0.2), axes)
    assert_close(jax.device_get(state.params), jax.device_get(trained[0].params), atol=2e-6)
    kernel = frozen["layers"]["attention"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / (axes.get("fsdp", 1) * axes.get("tensor", 1))
