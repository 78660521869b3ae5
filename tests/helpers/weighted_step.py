"""The train step of a very small model with policies that weight the loss, by name, on one device or on a mesh."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dataflex_jax.data.batch import Batch
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.policies.base import Mixer, Weighter
from dataflex_jax.policies.mixers.doremi import doremi
from dataflex_jax.policies.mixers.static import static
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.policies.weighters.adapt import AdaptState, adapt
from dataflex_jax.policies.weighters.joint_update_aware import JointUpdateAwareState, joint_update_aware
from dataflex_jax.policies.weighters.loss import loss
from dataflex_jax.policies.weighters.rho1 import rho1
from dataflex_jax.sharding import batch_sharding, make_mesh, replicated
from dataflex_jax.training.state import Fixed, TrainState
from dataflex_jax.training.step import TrainStep

MODEL = ModelConfig(
    architecture="qwen2",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
    initializer_range=0.3,
    dtype="float32",
    remat="none",
)
NUM_DOMAINS, LENGTH, LEARNING_RATE = 3, 12, 0.1
SGD = optax.sgd(LEARNING_RATE)
EVERY_STEP = Schedule(0, 1, -1)
ANCHOR = jnp.asarray(np.random.default_rng(9).normal(size=MODEL.hidden_size), jnp.float32)


class Policies(NamedTuple):
    """A mixer, weighters with their states as after a refresh, and whether the reference model runs in the step."""

    mixer: Mixer = static()
    weighters: tuple[tuple[Weighter, object], ...] = ()
    reference_in_step: bool = False

    def scheduled(self) -> tuple[Scheduled[Weighter], ...]:
        """As the train step wants them."""
        return tuple(Scheduled(str(i), weighter, EVERY_STEP) for i, (weighter, _) in enumerate(self.weighters))


_LOSS = loss(r=0.3), ()
_ADAPT = adapt(tau=0.3), AdaptState(ANCHOR / 4)
POLICIES = {
    "static": Policies(),
    "loss": Policies(weighters=(_LOSS,)),
    "adapt": Policies(weighters=(_ADAPT,)),
    "joint_update_aware": Policies(
        weighters=((joint_update_aware(tau=0.3), JointUpdateAwareState(ANCHOR / jnp.linalg.norm(ANCHOR))),)
    ),
    "rho1": Policies(weighters=((rho1(keep=0.5, reference="a run", reference_losses="cached"), ()),)),
    "doremi": Policies(doremi(reference="a run", reference_losses="cached")),
    "doremi, paper": Policies(doremi(reference="a run", loss_norm="paper"), reference_in_step=True),
    "doremi, loss+adapt": Policies(doremi(reference="a run", reference_losses="cached"), (_LOSS, _ADAPT)),
}


@functools.cache
def models() -> tuple[Model, Model]:
    """(the model, the reference model)."""
    create = jax.jit(functools.partial(Model.random, MODEL))
    return create(jax.random.key(0)), create(jax.random.key(5))


@jax.jit
def forward(model: Model, batch: Batch):
    """(token losses, last hidden states)."""
    return model.token_losses(batch)[:2]


def make_batch(seed: int = 0, rows: int = 8) -> Batch:
    """Rows of two of the three domains, of unequal numbers of tokens, with the reference's losses."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, LENGTH)) < 0.8).astype(np.float32)
    mask[0, 0] = (mask.sum() - mask[0, 0]) % 2  # an even number in all, for rho1's share of a repeated batch
    tokens = jnp.asarray(rng.integers(0, MODEL.vocab_size, (rows, LENGTH + 1)), jnp.int32)
    domains = np.arange(rows) % 2
    rng.shuffle(domains)
    batch = Batch(
        tokens=tokens,
        mask=jnp.asarray(mask),
        lengths=jnp.full(rows, LENGTH, jnp.int32),
        domain=jnp.asarray(domains, jnp.int32),
        drawn_with=jnp.asarray([0.5, 0.3, 0.2]),
    )
    return dataclasses.replace(batch, reference_losses=forward(models()[1], batch)[0])


def of_rows(batch: Batch, rows) -> Batch:
    """Some rows of a batch."""
    chosen = jax.tree.map(lambda value: value[rows], batch.rows_alone())
    return dataclasses.replace(chosen, drawn_with=batch.drawn_with)


def initial(policies: Policies) -> TrainState:
    """A fresh state."""
    mixer = policies.mixer.init(jnp.ones(NUM_DOMAINS) / NUM_DOMAINS)
    params = models()[0].params
    states = tuple(state for _, state in policies.weighters)
    return TrainState(jnp.int32(0), params, SGD.init(params), mixer, states, jax.random.key(1))


def train_step(policies: Policies, accumulation: int = 1, *, microbatches: bool = False) -> TrainStep:
    """The step, with a decision of the mixer in every step."""
    return TrainStep(
        Model.shape(MODEL),
        SGD,
        optax.constant_schedule(LEARNING_RATE),
        Scheduled("mixer", policies.mixer, EVERY_STEP),
        policies.scheduled(),
        grad_accumulation=accumulation,
        weigh_microbatches=microbatches,
    )


def take_step(
    policies: Policies, batch: Batch, accumulation: int = 1, *, microbatches: bool = False
) -> tuple[TrainState, dict]:
    """(the state after, the metrics) of one step on one device."""
    step = train_step(policies, accumulation, microbatches=microbatches)
    return jax.device_get(jax.jit(step)(initial(policies), *_inputs(policies, batch)))


def take_sharded_step(policies: Policies, batch: Batch) -> tuple[TrainState, dict]:
    """(the state after, the metrics) of one step with everything split over eight devices."""
    mesh = make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        state = initial(policies)
        shardings = param_shardings(mesh, state)
        rows = jax.device_put(batch.rows_alone(), batch_sharding(mesh))
        batch = dataclasses.replace(rows, drawn_with=jax.device_put(batch.drawn_with, replicated(mesh)))
        batch, fixed = _inputs(policies, batch)
        fixed = jax.device_put(fixed, param_shardings(mesh, fixed))
        step = jax.jit(train_step(policies), out_shardings=(shardings, replicated(mesh)))
        return jax.device_get(step(jax.device_put(state, shardings), batch, fixed))


def _inputs(policies: Policies, batch: Batch) -> tuple[Batch, Fixed]:
    if not policies.reference_in_step:
        return batch, Fixed()
    return dataclasses.replace(batch, reference_losses=None), Fixed(reference=models()[1])
