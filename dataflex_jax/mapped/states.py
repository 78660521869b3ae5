"""The states of S models as one: every leaf has a leading axis S, which is split over the mesh's "data" axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, PyTree

from dataflex_jax.errors import InputError
from dataflex_jax.mapped.members import Member
from dataflex_jax.policies import registry
from dataflex_jax.sharding import shardings
from dataflex_jax.training.assembly import Experiment
from dataflex_jax.training.learner import Learner
from dataflex_jax.training.state import TrainState
from dataflex_jax.training.weights import RANDOM, Origin, starting_params


def over_members(mesh: Mesh) -> NamedSharding:
    """The leading axis split over "data"."""
    return NamedSharding(mesh, P("data"))


def abstract(learner: Learner, count: int, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of `count` states; computes nothing."""

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=over_members(mesh))

    return jax.tree.map(stacked, learner.abstract)


def fresh(experiment: Experiment, members: Sequence[Member], mesh: Mesh) -> TrainState:
    """The states before the first step; each is what a run of the member's own would begin with.

    Raises:
        InputError: weights that cannot be read, proportions that the mixer refuses, or frozen parameters that would
            differ between members.
    """
    start = experiment.learner.start
    mixers = stacked([starting_mixer(experiment, member) for member in members])
    keys = jnp.stack([jax.random.key(member.seed) for member in members])

    def state(key, params, mixer):
        return start._replace(mixer=mixer).state(key, params)

    placing = shardings(abstract(experiment.learner, len(members), mesh))
    return jax.jit(jax.vmap(state), out_shardings=placing)(keys, _params(experiment, members), mixers)


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Trees as one with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member_state(learner: Learner):
    """(states, number) -> that member's state alone, where a run of its own would have it."""
    return jax.jit(
        lambda states, number: jax.tree.map(lambda leaf: leaf[number], states),
        out_shardings=shardings(learner.abstract),
    )


@jax.jit
def finite(states: TrainState) -> Bool[Array, " S"]:
    """Whether no floating-point leaf of a member's state has a NaN or an infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(states) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in leaves]).all(axis=0)


def drawn_domains(experiment: Experiment, members: Sequence[Member]) -> Bool[np.ndarray, "S K"]:
    """Which domains a member's mixer may draw from: those at a proportion above 0."""
    everything = np.ones(len(experiment.inputs.domains), bool)
    return np.stack([everything if m.proportions is None else np.asarray(m.proportions) > 0 for m in members])


def starting_mixer(experiment: Experiment, member: Member) -> PyTree:
    """A mixer's initial state."""
    if member.proportions is None:
        return experiment.learner.start.mixer
    proportions = jnp.asarray(member.proportions, jnp.float32)
    return registry.checked("mixer", experiment.policies.mixer.policy.init, proportions)


def _params(experiment: Experiment, members: Sequence[Member]) -> PyTree | None:
    """The trained parameters of all members; None: all are drawn."""
    learner, origin = experiment.learner, Origin.of(experiment.config)
    seeds = sorted({member.seed for member in members})
    if learner.base is not None and learner.base.name == RANDOM and seeds != [origin.seed]:
        raise InputError("random frozen parameters have one seed, models of several seeds need weights", option="seed")
    model, like = learner.model.config, learner.abstract.params
    read = [starting_params(origin._replace(seed=seed), model, like, learner.base) for seed in seeds]
    if read[0] is None:
        return None
    places = np.array([seeds.index(member.seed) for member in members])
    return jax.tree.map(lambda leaf: leaf[places], stacked(read))
