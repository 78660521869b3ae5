"""Signals are values: equal where they ask for the same, and only there."""

import dataclasses
import itertools
from typing import NamedTuple

import pytest

from dataflex_jax.policies import (
    TARGETS,
    Alignments,
    Embeddings,
    GradientNorms,
    Gradients,
    Influences,
    Losses,
    Preconditioner,
    Projection,
    registry,
)
from dataflex_jax.policies.common import pooling
from dataflex_jax.policies.common.influence import cosines, unit
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.signals import registry as computed
from dataflex_jax.signals.model_signals import losses

EXACT = Projection("none")
SIGNALS = [
    Losses(),
    GradientNorms(),
    GradientNorms("all"),
    Influences(),
    Influences(Preconditioner()),
    Alignments(),
    Embeddings(pooling.mean),
    Embeddings(pooling.last_token),
    Gradients(EXACT),
    Gradients(EXACT._replace(seed=1)),
    Gradients(EXACT, Preconditioner()),
    Gradients(EXACT, Preconditioner("inside")),
    Gradients(EXACT, Preconditioner(bias_correction=True)),
    Gradients(EXACT, then=cosines),
    Gradients(EXACT, then=unit),
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations([*SIGNALS, TARGETS], 2)))
def test_signals_of_other_types_or_with_other_fields_are_other_values(one, other):
    assert one != other
    assert len({one, other}) == 2
    if TARGETS not in (one, other):
        assert computed.row_function(one) is not computed.row_function(other)


@pytest.mark.parametrize("signal", SIGNALS)
def test_signals_that_ask_for_the_same_are_one_value_and_are_compiled_once(signal):
    again = dataclasses.replace(signal)
    assert again is not signal
    assert again == signal
    assert hash(again) == hash(signal)
    assert computed.row_function(again) is computed.row_function(signal)


def test_signals_of_ones_own_that_are_equal_as_tuples_are_compiled_each(monkeypatch):
    class Squares(NamedTuple):
        order: int = 2

    class Roots(NamedTuple):
        order: int = 2

    assert Squares() == Roots()
    monkeypatch.setattr(computed, "_MAKERS", {Squares: losses, Roots: losses})
    assert computed.row_function(Squares()) is computed.row_function(Squares())
    assert computed.row_function(Squares()) is not computed.row_function(Roots())


@pytest.mark.parametrize(
    ("kind", "comparing"),
    [
        ("mixer", set()),
        ("weighter", {"adapt", "joint_update_aware"}),
        ("selector", {"less", "icons", "nice", "cluster_less", "near", "tsds", "rds", "dsir", "greats"}),
    ],
)
def test_what_compares_with_the_target_set_needs_it(kind, comparing):
    factories = registry._FACTORIES[kind]
    for name in registry.names(kind):
        if not factories[name].__module__.startswith("dataflex_jax."):
            continue  # what other tests register
        section = registry.policy_config(kind, name)
        if "reference" in section:
            section.reference = "runs/reference"
        needs = registry.build(kind, section, Schedule(0, 1, -1)).policy.needs
        assert (TARGETS in needs) == (name in comparing), name
