"""The signals of one model: what `policies.base.Signals` promises, by sweeps over candidates and targets."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dataflex_jax.data.loader import Batch
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, lora
from dataflex_jax.policies.base import Embed, Preconditioner
from dataflex_jax.signals.gradients import adam_moments, gradient_features
from dataflex_jax.signals.projections import Projection
from dataflex_jax.signals.sweep import Source, Sweeper
from dataflex_jax.training.objective import real_inputs

PyTree = Any


class SignalFunctions:
    """The row functions of a run, made once so that they are compiled once.

    Args:
        graphdef: the model's static part.
        optim: `config.optim`, for Adam's constants.
    """

    def __init__(self, graphdef: nnx.GraphDef, optim: ConfigDict):
        self.graphdef, self.optim = graphdef, optim

    @functools.cached_property
    def losses(self) -> Callable[[PyTree, Batch], Float[Array, " B"]]:
        """(params, frozen), batch -> token-mean loss of each row."""

        def losses(operands, batch):
            params, frozen = operands
            token_losses, _ = decoder.token_losses(self.graphdef, lora.combine(frozen, params), batch["tokens"])
            tokens = jnp.sum(batch["mask"], axis=1)
            return jnp.where(tokens > 0, jnp.sum(batch["mask"] * token_losses, axis=1) / tokens, jnp.nan)

        return losses

    @functools.cache  # noqa: B019 - as long-lived as the run
    def embeddings(self, embed: Embed) -> Callable[[PyTree, Batch], Float[Array, "B E"]]:
        """(params, frozen), batch -> `embed` of each row."""

        def embeddings(operands, batch):
            params, frozen = operands
            tokens = batch["tokens"][:, :-1]
            hidden = decoder.hidden_states(self.graphdef, lora.combine(frozen, params), tokens)
            return embed(hidden, real_inputs(batch))

        return embeddings

    @functools.cache  # noqa: B019 - as long-lived as the run
    def gradients(
        self, projection: Projection, adam: Preconditioner | None, then: Callable | None
    ) -> Callable[[PyTree, Batch], Float[Array, "B *F"]]:
        """(params, frozen, optimizer state or None, operand), batch -> `then` of each row's projected gradient."""
        features = gradient_features(self.graphdef, projection)

        def gradients(operands, batch):
            params, frozen, opt_state, operand = operands
            moments = None
            if adam is not None:
                constants = {name: self.optim[name] for name in ("b1", "b2", "eps")}
                moments = adam_moments(opt_state, **constants, **adam._asdict())
            found = features(params, frozen, batch, moments)
            return found if then is None else then(found, operand)

        return gradients


class ModelSignals:
    """The signals of one model; see `policies.base.Signals`.

    Args:
        functions: of the run.
        sweeper: runs them.
        params: the trained parameters.
        frozen: those beside them, or None.
        opt_state: the optimizer's state; None: unknown.
        candidates: the N training rows.
        targets: the target set, and its rows for sweeps; None: none.
    """

    def __init__(
        self,
        functions: SignalFunctions,
        sweeper: Sweeper,
        params: PyTree,
        frozen: PyTree | None,
        opt_state: PyTree | None,
        candidates: Source,
        targets: tuple[TargetSet, Source] | None,
    ):
        self._functions, self._sweeper = functions, sweeper
        self._params, self._frozen, self._opt_state = params, frozen, opt_state
        target_set, target_rows = targets or (None, None)
        self._rows = {"candidates": candidates, "targets": target_rows}
        self._ids = {"candidates": np.arange(candidates.pool.num_rows), "targets": target_set and target_set.ids}
        self.num_candidates = candidates.pool.num_rows
        self.num_targets = len(target_set.ids) if target_set else 0
        self.target_groups = target_set.groups if target_set else np.zeros(0, np.int64)
        self.group_names = target_set.names if target_set else ()

    @property
    def checkpoints(self) -> Sequence[tuple[float, "ModelSignals"]]:
        """This model alone, with weight 1."""
        return ((1.0, self),)

    def losses(self, which: str = "candidates", ids: Int[np.ndarray, " n"] | None = None) -> Float[np.ndarray, " n"]:
        """See `policies.base.Signals`."""
        return self._sweep(self._functions.losses, (self._params, self._frozen), which, ids, "losses")

    def embeddings(
        self, embed: Embed, which: str = "candidates", ids: Int[np.ndarray, " n"] | None = None
    ) -> Float[np.ndarray, "n E"]:
        """See `policies.base.Signals`."""
        operands = (self._params, self._frozen)
        return self._sweep(self._functions.embeddings(embed), operands, which, ids, "embeddings")

    def gradients(
        self,
        projection: Projection,
        which: str = "candidates",
        ids: Int[np.ndarray, " n"] | None = None,
        *,
        adam: Preconditioner | None = None,
        then: Callable[[Float[Array, "B P"], PyTree], Float[Array, "B *F"]] | None = None,
        operand: PyTree = None,
    ) -> Float[np.ndarray, "n *F"]:
        """See `policies.base.Signals`."""
        if adam is not None and self._opt_state is None:
            raise InputError(
                'config.selector.gradient_type = "adam": there is no Adam state; "sgd" takes the plain gradients'
            )
        operands = (self._params, self._frozen, self._opt_state if adam is not None else None, operand)
        return self._sweep(self._functions.gradients(projection, adam, then), operands, which, ids, "gradients")

    def _sweep(self, function, operands, which: str, ids, what: str) -> np.ndarray:
        rows = self._rows[which]
        if rows is None:
            raise InputError("config.targets: needed by this policy; say where the target set comes from")
        chosen = self._ids[which] if ids is None else self._ids[which][ids]
        return self._sweeper.run(function, operands, rows, chosen, f"{what} of {which}")


@functools.partial(jax.jit, static_argnums=0)
def domain_gram(
    graphdef: nnx.GraphDef, params: PyTree, frozen: PyTree | None, batches: Batch, target: Batch | None
) -> tuple[Float[Array, "K K"], Float[Array, " K"] | None]:
    """Inner products of the gradients of K mean losses, and those with a target's.

    Holds K gradients at once, in float32 and split like the parameters.

    Args:
        graphdef: the model's static part.
        params: the trained parameters.
        frozen: those beside them, or None.
        batches: tokens [K, B, T+1], mask [K, B, T].
        target: tokens [B, T+1], mask [B, T] of the target set; None: none.
    """

    def mean_loss(params, batch):
        losses, _ = decoder.token_losses(graphdef, lora.combine(frozen, params), batch["tokens"])
        return jnp.sum(batch["mask"] * losses) / jnp.sum(batch["mask"])

    gradient = jax.grad(mean_loss)
    each = jax.lax.map(lambda batch: gradient(params, batch), batches)

    def products(left, right):
        def leaf(x, y):
            x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
            return jnp.matmul(x, y.T, precision="highest", preferred_element_type=jnp.float32)

        return sum(jax.tree.leaves(jax.tree.map(leaf, left, right)))

    along = None
    if target is not None:
        wanted = jax.tree.map(lambda g: g[None], gradient(params, target))
        along = products(each, wanted)[:, 0]
    return products(each, each), along
