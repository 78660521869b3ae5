"""What a run trains: the model, what of it is frozen, the optimizer, and the state that training begins from."""

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from dataflex_jax.models.config import check_experts, check_mixture
from dataflex_jax.models.model import Model
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.signals import ROUTERS
from dataflex_jax.training import optim
from dataflex_jax.training.fits import check_memory
from dataflex_jax.training.rehearsal import Sizes, rehearse
from dataflex_jax.training.state import Start, TrainState
from dataflex_jax.training.weights import Base, Origin, open_base, resolved_model, starting_params, trained_of


class Learner(NamedTuple):
    """What a run trains.

    Attributes:
        start: the model's shape, the optimizer and the policies' initial states.
        base: the frozen parameters; None where all are trained.
        learning_rate: the schedule inside the optimizer.
        abstract: shapes, dtypes and shardings of the state.
    """

    start: Start
    base: Base | None
    learning_rate: optax.Schedule
    abstract: TrainState

    @property
    def model(self) -> Model:
        """Without the trained parameters."""
        return self.start.model.having(None, self.frozen)

    @property
    def frozen(self) -> PyTree | None:
        """The parameters beside the trained ones, or None."""
        return self.base and self.base.params


def make_learner(
    config: ConfigDict, vocab_size: int, policies: ActivePolicies, proportions: Float[Array, " K"], mesh: Mesh
) -> Learner:
    """Builds what the configuration says to train; reads frozen parameters, if there are any, but no others.

    Args:
        config: of the run.
        vocab_size: of its tokenizer.
        policies: of the run, whose states are part of what a step changes.
        proportions: the mixer's, at the start.
        mesh: the devices.

    Raises:
        InputError: a model that cannot be resolved or is too large, a base that cannot be read, proportions that a
            mixer refuses, or a policy that returns what no step can work with.
    """
    model = resolved_model(config, vocab_size)
    check_memory(model)
    if policies.needs(ROUTERS):
        who = f"mixer {policies.mixer.name!r}" if ROUTERS in policies.mixer.policy.needs else "a policy of this run"
        check_mixture(model, f"{who} needs a mixture of experts")
    check_experts(model, mesh.shape["expert"])
    mixer = registry.checked("mixer", policies.mixer.policy.init, proportions)
    weighters = tuple(weighter.policy.init(model.hidden_size) for weighter in policies.weighters)
    rehearse(policies, mixer, weighters, Sizes.of(config.data, len(proportions), model.hidden_size))
    trained = trained_of(model, config.model.trainable)
    base = open_base(Origin.of(config), model, trained, mesh)
    learning_rate = optim.learning_rate(config.optim, config.train_step)
    start = Start(Model.shape(model), trained, optim.adamw(config.optim, learning_rate), mixer, weighters)
    return Learner(start, base, learning_rate, start.abstract(mesh))


def fresh_state(learner: Learner, config: ConfigDict) -> TrainState:
    """The state before the first step, on the mesh, with the weights that the configuration names.

    Raises:
        InputError: weights that cannot be read or do not fit.
    """
    params = starting_params(Origin.of(config), learner.model.config, learner.abstract.params, learner.base)
    return learner.start.placed(jax.random.key(config.seed), learner.abstract, params)
