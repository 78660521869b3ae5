"""Which rows each of S models sees next, and one batch of all of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64, Int64

from dataflex_jax.data import sampler as sampling
from dataflex_jax.data.batch import Batch
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Group
from dataflex_jax.data.sampler import Plan, Sampler, SamplerState
from dataflex_jax.data.window import Sequences, Window
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.states import over_members
from dataflex_jax.training import resume
from dataflex_jax.training.assembly import Experiment
from dataflex_jax.training.ledger import Position


class Draws:
    """A sampler and sequences of rows for each member, over one pool; each draws what a run of its own would.

    Args:
        experiment: what the members share.
        members: the S models.
        loader: gathers the rows.
        mesh: the devices.

    Raises:
        InputError: a member without rows of a group that the sampler draws from.
    """

    def __init__(self, experiment: Experiment, members: Sequence[Member], loader: Loader, mesh: Mesh):
        data, policies = experiment.config.data, experiment.policies
        self._pool, self._by_domain = experiment.inputs.pool, policies.by_domain
        self._identity, self._loader = experiment.identity, loader
        self._sharding = over_members(mesh)
        groups = self._pool.groups(by_domain=policies.by_domain)
        self._samplers = [Sampler(member.seed, data.batch_size, data.draw) for member in members]
        self._sequences = [_sequences(groups, member) for member in members]

    def beginnings(self, initial_weights: Float64[np.ndarray, "S K"]) -> list[Position]:
        """Where each stands before the first step, with what its mixer draws with then."""
        names = tuple(self._identity.stores)
        return [
            resume.beginning(self._identity._replace(initial_weights=dict(zip(names, weights.tolist(), strict=True))))
            for weights in initial_weights
        ]

    def plans(self, states: Sequence[SamplerState]) -> list[tuple[Plan, SamplerState]]:
        """Each one's next step, and its sampler's state after it."""
        return [sampler.plan(state) for sampler, state in zip(self._samplers, states, strict=True)]

    def rows(self, plans: Sequence[Plan]) -> Int64[np.ndarray, "S B"]:
        """The pool's rows of some plans."""
        return np.stack([sequences.ids(plan) for sequences, plan in zip(self._sequences, plans, strict=True)])

    def domain_rows(self, rows: Int64[np.ndarray, "S B"]) -> Int64[np.ndarray, "S K"]:
        """How many of them are of each domain."""
        count = len(self._pool.domains)
        return np.stack([np.bincount(self._pool.domain_of(ids), minlength=count) for ids in rows])

    def load(self, rows: Int64[np.ndarray, "S B"], plans: Sequence[Plan], length: int | None = None) -> Batch:
        """The batch of S times B rows, every field with a leading axis S, on the devices.

        Args:
            rows: of `plans`.
            plans: the steps.
            length: T; None: the smallest bucket that holds all of the rows.
        """
        flat, mine = rows.ravel(), np.zeros(rows.shape, bool)
        for index in self._sharding.addressable_devices_indices_map(rows.shape).values():
            mine[index] = True
        batch = self._loader.gathered(flat, mine.ravel(), length)
        batch = jax.tree.map(lambda values: values.reshape(*rows.shape, *values.shape[1:]), batch)
        weights = [plan.drawn_with if self._by_domain else self._pool.natural for plan in plans]
        batch = dataclasses.replace(batch, drawn_with=np.stack(weights).astype(np.float32))
        return jax.tree.map(self._placed, batch)

    def to_json(self, position: Position) -> dict[str, Any]:
        """Where a member stands, for a checkpoint."""
        return {
            "sampler": sampling.to_json(position.sampler, self._identity.groups()),
            "tokens_seen": position.tokens_seen,
            "rows_seen": position.rows_seen.tolist(),
        }

    def from_json(self, saved: dict[str, Any]) -> Position:
        """The position that `to_json` wrote."""
        sampler = sampling.from_json(saved["sampler"], self._identity.groups())
        return Position(sampler, saved["tokens_seen"], np.asarray(saved["rows_seen"], np.int64))

    def _placed(self, values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, self._sharding, values.__getitem__)


def _sequences(groups: Sequence[Group], member: Member) -> Sequences:
    sequences = Sequences(groups, member.seed)
    if (rows := member.rows_by_group(groups)) is not None:
        sequences.open(Window(0, np.zeros(len(groups), np.int64), rows, ordered=False))
    return sequences
