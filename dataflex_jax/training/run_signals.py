"""The signals of a run: its data, its target set and its model as they are between two steps."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.loader import Batch
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.targets import TargetSet, open_targets
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.base import DomainGradients
from dataflex_jax.signals.model import ModelSignals, SignalFunctions, domain_gram
from dataflex_jax.signals.sweep import Source, Sweeper, source
from dataflex_jax.training.step import PyTree, TrainState


class RunSignals:
    """Makes the signals of a state's model.

    Args:
        config: of the run.
        graphdef: the model's static part.
        frozen: parameters beside the trained ones, or None.
        pool: the training rows.
        domains: the training data.
        tokenizer: as a value of `config.data.tokenizer`.
        sweeper: runs the sweeps.
        mesh: the devices.
        policies: of the run; the target set is opened where one of them wants it.

    Raises:
        InputError: a target set that cannot be read.
    """

    def __init__(
        self,
        config: ConfigDict,
        graphdef: nnx.GraphDef,
        frozen: PyTree | None,
        pool: Pool,
        domains: Sequence[Domain],
        tokenizer: str | Path,
        sweeper: Sweeper,
        mesh: Mesh,
        policies: ActivePolicies,
    ):
        self._graphdef, self._frozen, self._sweeper, self._seed = graphdef, frozen, sweeper, config.seed
        self._functions = SignalFunctions(graphdef, config.optim)
        self.rows = source(pool, mesh)
        self._targets: tuple[TargetSet, Source] | None = None
        if policies.want_targets:
            target_set = open_targets(config, domains, tokenizer)
            self._targets = target_set, source(target_set.pool, mesh)

    def of(self, state: TrainState) -> ModelSignals:
        """The signals of the model that `state` holds."""
        return ModelSignals(
            self._functions, self._sweeper, state.params, self._frozen, state.opt_state, self.rows, self._targets
        )

    def domain_gradients(
        self, state: TrainState, step: int, *, learning_rate: optax.Schedule, rows: int
    ) -> DomainGradients:
        """The inner products of the domains' gradients on `rows` random rows each, other ones at every step."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, step]))
        offsets = self.rows.pool.offsets
        bounds = itertools.pairwise(offsets)
        ids = np.stack([random.integers(low, high, rows) for low, high in bounds], axis=1)
        batch = self.rows.loader.load(ids.reshape(-1), np.ones(1))
        target = None
        if self._targets is not None:
            target_set, target_rows = self._targets
            picked = target_set.ids[random.integers(0, len(target_set.ids), rows)]
            target = _fields(target_rows.loader.load(picked, np.ones(1)))
        domains = _by_domain(_fields(batch), len(offsets) - 1)
        gram, along = domain_gram(self._graphdef, state.params, self._frozen, domains, target)
        return DomainGradients(gram, along, np.float32(learning_rate(step)))


def _fields(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("tokens", "mask")}


@functools.partial(jax.jit, static_argnums=1)
def _by_domain(batch: Batch, num_domains: int) -> Batch:
    """[B * K, ...] with every domain's rows on every device -> [K, B, ...]."""
    return {name: jnp.swapaxes(x.reshape(-1, num_domains, *x.shape[1:]), 0, 1) for name, x in batch.items()}
