"""Signals of arrays instead of a model, for tests of policies."""

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.policies import Embeddings, GateLoads, GradientNorms, Gradients, Influences, Losses, Request
from dataflex_jax.signals.model_signals import layer_numbers

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


class FakeRows:
    """A row set that answers with the rows of given arrays, in small batches as a sweep does.

    Attributes:
        losses: float [n].
        gradients: float [n, size], plain ones.
        preconditioned: float [n, size], what Adam makes of them.
        hidden: last hidden states [n, T, D]; or those of all layers [n, L, T, D], of which the signal takes some.
        mask: of `hidden`, [n, T].
        written: their texts.
        gates: loads of the last router, [n, E].
        asked: the signals, in order.
    """

    def __init__(
        self,
        *,
        losses=None,
        gradients=None,
        preconditioned=None,
        hidden=None,
        mask=None,
        written=None,
        gates=None,
        groups=None,
        names=None,
    ):
        self.gates = gates
        self.losses, self.hidden, self.mask, self.written = losses, hidden, mask, written
        self.gradients, self.preconditioned = (
            None if rows is None else np.asarray(rows, np.float32) for rows in (gradients, preconditioned)
        )
        given = (losses, gradients, preconditioned, hidden, written, gates)
        self.num_rows = next(len(rows) for rows in given if rows is not None)
        self.groups = np.zeros(self.num_rows, np.int32) if groups is None else np.asarray(groups, np.int32)
        self.group_names = tuple(names or (f"group{i}" for i in range(self.groups.max() + 1)))
        self.asked = []

    def sweep(self, signal, ids=None, operand=None):
        self.asked.append(signal)
        ids = np.arange(self.num_rows) if ids is None else ids
        match signal:
            case Losses():
                return np.asarray(self.losses, np.float32)[ids]
            case GateLoads(layers="last"):
                return np.asarray(self.gates, np.float32)[ids]
            case Embeddings(embed, whole, then, layers):
                assert not whole, "these hidden states are of the inputs"
                if layers is None:
                    embeddings = _in_batches(jax.jit(embed), self.hidden[ids], self.mask[ids])
                else:
                    each = jax.jit(jax.vmap(embed, (1, None), 1))
                    numbers = np.asarray(layer_numbers(layers, self.hidden.shape[1]))
                    embeddings = _in_batches(each, self.hidden[ids][:, numbers - 1], self.mask[ids])
                return (
                    embeddings if then is None else _in_batches(jax.jit(lambda rows: then(rows, operand)), embeddings)
                )
            case Gradients(projection, adam, then):
                rows = (self.gradients if adam is None else self.preconditioned)[ids]
                with np.errstate(invalid="ignore"):
                    features = rows @ projection_matrix(projection, rows.shape[1])
                if then is None:
                    return features
                return _in_batches(jax.jit(lambda rows: then(rows, operand)), features)
            case GradientNorms():
                with np.errstate(invalid="ignore", over="ignore"):
                    return _norms(self.gradients[ids])
            case Influences(adam, then):
                rows = (self.gradients if adam is None else self.preconditioned)[ids].astype(np.float64)
                with np.errstate(invalid="ignore", over="ignore"):
                    norms = _norms(rows)[:, None]
                    found = (rows @ np.asarray(operand["all"], np.float64).T / norms).astype(np.float32)
                return found if then is None else _in_batches(jax.jit(then), found)
        raise AssertionError(f"nothing to answer {signal} with")

    def texts(self):
        return iter(self.written)

    def gradient_sums(self, weights, parameters="blocks"):
        used = weights.any(axis=1)
        return {"all": jnp.asarray(weights[used].T.astype(np.float64) @ self.gradients[used], jnp.float32)}


class FakeSignals:
    """The signals of one model from row sets.

    Attributes:
        candidates: the training rows; None where nobody may ask for them.
        targets: the target set, or None.
        held_out: the held-out rows, or None.
        checkpoints: this model alone, unless a test says otherwise.
        room: how many directions fit into the memory.
    """

    def __init__(self, candidates=None, targets=None, domain_gradients=None, held_out=None):
        self.candidates, self.targets, self.held_out, self.room = candidates, targets, held_out, 100
        self.checkpoints = ((1.0, self),)
        self._domain_gradients = domain_gradients

    def room_for_directions(self, parameters="blocks"):
        return self.room

    def domain_gradients(self):
        assert self._domain_gradients is not None
        return self._domain_gradients


def _norms(rows):
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    return np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)


def _in_batches(function, *arrays):
    starts = range(0, len(arrays[0]), BATCH)
    return np.concatenate([np.asarray(function(*(a[s : s + BATCH] for a in arrays))) for s in starts])
