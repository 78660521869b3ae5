"""The losses of S models on groups of rows that none of them trains on."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float64, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.mapped.programs import mapped_losses
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import replicated


def bytes_per_token(targets: TargetSet) -> Float64[np.ndarray, " G"]:
    """UTF-8 bytes of text that a token in the loss stands for, on average over each group's rows."""
    tokens = _tokens(targets)
    of_domain = np.array([getattr(d, targets.pool.split).bytes_per_target for d in targets.pool.domains])
    num_bytes = tokens * of_domain[targets.pool.domain_of(targets.ids)]
    count = len(targets.names)
    return np.bincount(targets.groups, num_bytes, count) / np.bincount(targets.groups, tokens, count)


def tokens_in_loss(targets: TargetSet) -> Float64[np.ndarray, " G"]:
    """How many tokens of each group count in its loss."""
    return np.bincount(targets.groups, _tokens(targets), len(targets.names))


def _tokens(targets: TargetSet) -> Float64[np.ndarray, " M"]:
    return np.array([targets.pool.row(int(i)).mask.sum() for i in targets.ids], np.float64)


class Measure:
    """Measures models; compiles once for each length of rows.

    Args:
        targets: the rows and their groups.
        rows: of a batch.
        mesh: the devices.
    """

    def __init__(self, targets: TargetSet, rows: int, mesh: jax.sharding.Mesh):
        self._targets, self._mesh = targets, mesh
        self._rows = min(rows, len(targets.ids))
        self._loader = Loader(targets.pool, mesh)
        self._sums = mapped_losses(len(targets.names), mesh)

    def losses(self, params: PyTree, model: Model) -> Float64[np.ndarray, "S G"]:
        """The token-mean loss of each model on each group, in nats.

        Args:
            params: the trained parameters with a leading axis S.
            model: the model without them.
        """
        found = jax.device_get([self._sums(params, model, batch) for batch in self._batches()])
        sums, tokens = (sum(np.asarray(pair[i], np.float64) for pair in found) for i in range(2))
        return sums / tokens

    def _batches(self) -> Iterator[Batch]:
        ids, groups = self._targets.ids, self._targets.groups
        # Rows of like length side by side are padded least.
        order = np.argsort([-self._targets.pool.length(int(i)) for i in ids], kind="stable")
        for first in range(0, len(ids), self._rows):
            places = order[first : first + self._rows]
            padded, of_group = np.full(self._rows, -1, np.int64), np.zeros(self._rows, np.int32)
            padded[: len(places)], of_group[: len(places)] = ids[places], groups[places]
            batch = self._loader.gathered(padded, np.ones(self._rows, bool))
            yield jax.device_put(dataclasses.replace(batch, domain=of_group), replicated(self._mesh))
