"""Signals of arrays instead of a model, for tests of selectors and weighters."""

import jax
import numpy as np

from dataflex_jax.policies.base import Request

BATCH = 7


def projection_matrix(projection, size):
    """A dense random map for any method but "none"."""
    if projection.method == "none":
        return np.eye(size, dtype=np.float32)
    rng = np.random.default_rng(projection.seed)
    return rng.choice([-1, 1], (size, projection.dim)).astype(np.float32) / np.float32(np.sqrt(projection.dim))


def request(update=1, updates=1, seed=0):
    """The request of an update."""
    return Request(np.int32(update), np.int32(updates), jax.random.key(seed))


class FakeSignals:
    """Answers with the rows of given arrays, in small batches as a sweep does, and counts the sweeps in `calls`.

    Attributes:
        losses_of: "candidates" and "targets" -> float [n].
        gradients_of: (set, whether preconditioned) -> float [n, size].
        hidden_of: set -> (last hidden states [n, T, D], mask [n, T]).
    """

    def __init__(self, *, losses=None, gradients=None, hidden=None, groups=(), names=None):
        self.losses_of = {name: np.asarray(values) for name, values in (losses or {}).items()}
        self.gradients_of = {name: np.asarray(values, np.float32) for name, values in (gradients or {}).items()}
        self.hidden_of = hidden or {}
        self.target_groups = np.asarray(groups, np.int32)
        self.num_targets = len(self.target_groups)
        num_groups = self.target_groups.max(initial=-1) + 1
        self.group_names = tuple(names or (f"group{i}" for i in range(num_groups)))
        self.checkpoints = ((1.0, self),)
        self.calls = []
        every = [v for k, v in self.losses_of.items() if k == "candidates"]
        every += [v for (name, _), v in self.gradients_of.items() if name == "candidates"]
        every += [v[0] for k, v in self.hidden_of.items() if k == "candidates"]
        self.num_candidates = len(every[0])

    def losses(self, which="candidates", ids=None):
        self.calls.append(("losses", which))
        values = self.losses_of[which].astype(np.float32)
        return values if ids is None else values[ids]

    def embeddings(self, embed, which="candidates", ids=None):
        self.calls.append(("embeddings", which))
        arrays = [a if ids is None else a[ids] for a in self.hidden_of[which]]
        return _in_batches(jax.jit(embed), *arrays)

    def gradients(self, projection, which="candidates", ids=None, *, adam=None, then=None, operand=None):
        self.calls.append(("gradients", which, adam))
        values = self.gradients_of[which, adam is not None]
        values = values if ids is None else values[ids]
        with np.errstate(invalid="ignore"):
            features = values @ projection_matrix(projection, values.shape[1])
        if then is None:
            return features
        return _in_batches(jax.jit(lambda rows: then(rows, operand)), features)


def _in_batches(function, *arrays):
    starts = range(0, len(arrays[0]), BATCH)
    return np.concatenate([np.asarray(function(*(a[s : s + BATCH] for a in arrays))) for s in starts])
