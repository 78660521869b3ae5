"""What a run trains: the model, what of it is frozen, the optimizer, and the state that training begins from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.models import lora
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.sharding import shardings
from dataflex_jax.training import optim
from dataflex_jax.training.step import PyTree, TrainState, abstract_state, init_state
from dataflex_jax.training.weights import Base, open_base, starting_params


class Learner(NamedTuple):
    """What a run trains.

    Attributes:
        model: its shape.
        base: the frozen parameters of a run with adapters; None where all are trained.
        optimizer: optax transformation.
        learning_rate: the schedule inside it.
        mixer: the mixer's initial state.
        init: (key, the trained parameters to start from or None) -> the model's static part and a fresh state.
        graphdef: the model's static part.
        abstract: shapes, dtypes and shardings of the state.
    """

    model: ModelConfig
    base: Base | None
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    mixer: PyTree
    init: Callable[[PRNGKeyArray, PyTree | None], tuple[nnx.GraphDef, TrainState]]
    graphdef: nnx.GraphDef
    abstract: TrainState

    @property
    def frozen(self) -> PyTree | None:
        """The parameters beside the trained ones, or None."""
        return self.base and self.base.params


def make_learner(
    config: ConfigDict,
    tokenizer: Tokenizer,
    policies: ActivePolicies,
    proportions: Float[Array, " K"],
    mesh: Mesh,
) -> Learner:
    """Builds what the configuration says to train; reads frozen parameters, if there are any, but no others.

    Args:
        config: of the run.
        tokenizer: of the run.
        policies: of the run, whose states are part of what a step changes.
        proportions: the mixer's, at the start.
        mesh: the devices.

    Raises:
        InputError: a model that cannot be resolved, a base that cannot be read, or proportions that a mixer refuses.
    """
    model = dataclasses.replace(model_config(config.model, tokenizer.vocab_size), lora=lora.lora_config(config.lora))
    base = open_base(config, model, mesh)
    mixer = registry.checked("mixer", policies.mixer.init, proportions)
    weighters = tuple(scheduled.weighter.init(model.hidden_size) for scheduled in policies.weighters)
    learning_rate = optim.learning_rate(config.optim, config.train_step)
    optimizer = optim.adamw(config.optim, learning_rate)
    init = functools.partial(init_state, model, optimizer, mixer, weighters)
    graphdef, abstract = abstract_state(init, mesh)
    return Learner(model, base, optimizer, learning_rate, mixer, init, graphdef, abstract)


def fresh_state(learner: Learner, config: ConfigDict) -> TrainState:
    """The state before the first step, on the mesh, with the weights that the configuration names.

    Raises:
        InputError: weights that cannot be read or do not fit.
    """
    pretrained = starting_params(config, learner.model, learner.base, learner.abstract.params)
    start = jax.jit(
        lambda key, params: learner.init(key, params)[1],
        out_shardings=shardings(learner.abstract),
        donate_argnums=1,
    )
    return start(jax.random.key(config.seed), pretrained)
