"""The state of a run: all that a step changes, and what it begins as."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from dataflex_jax.models import layout
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import shardings


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: optimizer steps done, int32.
        params: the parameters that are trained: all of the model's, its adapters, or others that the run selects.
        opt_state: of the optax transformation.
        mixer: the mixer's state.
        weighters: the weighters' states, in their order.
        key: the run's policy key, constant; steps and updates are folded in.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    mixer: PyTree
    weighters: tuple[PyTree, ...]
    key: PRNGKeyArray


class Fixed(NamedTuple):
    """Parameters that a step reads and does not change.

    Attributes:
        frozen: those beside the trained ones; None where all are trained.
        reference: the reference model, where its losses are computed in the step.
    """

    frozen: PyTree | None = None
    reference: Model | None = None


NOTHING_FIXED = Fixed()


class Start(NamedTuple):
    """What a run starts from, beside its parameters: the model, what is trained of it, the optimizer and the policies.

    Attributes:
        model: its shape.
        trained: which parameters are trained, by path; None: all.
        optimizer: optax transformation.
        mixer: the mixer's initial state.
        weighters: the weighters' initial states.
    """

    model: Model
    trained: Callable[[str], bool] | None
    optimizer: optax.GradientTransformation
    mixer: PyTree = ()
    weighters: tuple[PyTree, ...] = ()

    def state(self, key: PRNGKeyArray, params: PyTree | None = None) -> TrainState:
        """A fresh state.

        Args:
            key: of all randomness.
            params: the trained parameters to start from; None: random ones.
        """
        model_key, policy_key = initial_keys(key)
        if params is None:
            model = Model.random(self.model.config, model_key)
            params = model.params if self.trained is None else model.training(self.trained).params
        opt_state = self.optimizer.init(params)
        return TrainState(jnp.int32(0), params, opt_state, self.mixer, self.weighters, policy_key)

    def placed(self, key: PRNGKeyArray, abstract: TrainState, params: PyTree | None = None) -> TrainState:
        """`state` on the devices, as `abstract` says; `params` are given away."""
        make = jax.jit(self.state, out_shardings=shardings(abstract), donate_argnums=1)
        return make(key, params)

    def abstract(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state; computes nothing."""
        return layout.placed(mesh, jax.eval_shape(lambda: self.state(jax.random.key(0))))


def initial_keys(key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The run's key in two: for the model's random weights, and for the policies."""
    return tuple(jax.random.split(key))


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no floating-point leaf has a NaN or an infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
