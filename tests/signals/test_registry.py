"""A signal of one's own: registered, asked of a row set, compiled once for each value."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.signals.registry import Subject, register_signal, row_function
from tests.helpers.array_rows import POOL, signals_of, whole_batch
from tests.helpers.gradient_model import MODEL, build

TRACES = []


@dataclasses.dataclass(frozen=True)
class Surprise:
    """Sum over a row's targets of loss ** order, and the number of those beyond the operand."""

    order: int = 2


@register_signal(Surprise)
def surprise(signal):
    def of_rows(subject, batch, operand):
        TRACES.append((signal, batch.tokens.shape[1] - 1))
        losses = subject.model.token_losses(batch).losses
        return {
            "sum": jnp.sum(batch.mask * losses**signal.order, axis=1),
            "above": jnp.sum(batch.mask * (losses > operand), axis=1),
        }

    return of_rows


def test_a_signal_of_ones_own_is_swept_and_compiled_once_for_each_value():
    model, batch = build(MODEL), whole_batch()
    losses = np.asarray(model.token_losses(batch).losses, np.float64)
    signals = signals_of(Subject(model))
    TRACES.clear()
    for order, threshold in ((2, 3.0), (3, 3.0), (2, 4.0)):
        found = signals.candidates.sweep(Surprise(order), operand=jnp.float32(threshold))
        assert found.keys() == {"sum", "above"}
        np.testing.assert_allclose(found["sum"], (batch.mask * losses**order).sum(axis=1), rtol=1e-5)
        np.testing.assert_array_equal(found["above"], (batch.mask * (losses > threshold)).sum(axis=1))
    assert 0 < found["above"].sum() < batch.mask.sum()
    assert found["sum"][:-1].min() == found["sum"][4] == 0  # the domains' last rows have no target
    assert set(TRACES) == set(itertools.product((Surprise(2), Surprise(3)), POOL.buckets))
    assert len(TRACES) == len(set(TRACES))
    assert row_function(Surprise(2)) is row_function(Surprise())


def test_another_module_may_not_say_how_a_signal_is_computed():
    def theirs(signal):
        raise AssertionError

    theirs.__module__ = "another_plugin"
    with pytest.raises(ValueError, match=r"^Surprise: tests\.signals\.test_registry has registered how it is computed"):
        register_signal(Surprise)(theirs)
    # The same module may, such as when it is loaded again.
    assert register_signal(Surprise)(surprise) is surprise


def test_an_unknown_signal_is_named_with_the_known_ones():
    @dataclasses.dataclass(frozen=True)
    class Unheard:
        """Nobody computes it."""

    with pytest.raises(ValueError, match=r"^Unheard: no signal of this type is registered; there are Alignments, .*Su"):
        signals_of(Subject(build(MODEL))).candidates.sweep(Unheard())
