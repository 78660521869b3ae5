"""Row sets: which rows they have, in which groups, and that a sweep over some of them gives theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError
from dataflex_jax.policies.common.pooling import mean
from dataflex_jax.policies.signals import Embeddings
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.registry import Subject, register_signal
from dataflex_jax.signals.sweep import source
from tests.helpers.array_rows import (
    POOL,
    TARGET_GROUPS,
    TARGET_IDS,
    TARGET_NAMES,
    TARGET_POOL,
    pool_of,
    random_rows,
    signals_of,
    whole_batch,
)
from tests.helpers.gradient_model import MODEL, build


@dataclasses.dataclass(frozen=True)
class Rows:
    """Each row's tokens and number of inputs, and a number of the model's."""


@register_signal(Rows)
def rows(signal):
    del signal

    def of_rows(subject, batch, operand):
        del operand
        scale = jnp.full(batch.num_rows, subject.model.params["norm"]["scale"][0])
        return {"tokens": batch.tokens, "lengths": batch.lengths, "scale": scale}

    return of_rows


@pytest.fixture(scope="module")
def signals():
    return signals_of(Subject(build(MODEL)))


def assert_rows(found, pool, ids):
    """A sweep has given the rows `ids` of `pool`, in order."""
    batch = whole_batch(pool)
    np.testing.assert_array_equal(found["lengths"], batch.lengths[ids])
    longest = found["tokens"].shape[1]
    np.testing.assert_array_equal(found["tokens"], batch.tokens[ids, :longest])
    assert not batch.tokens[ids, longest:].any()
    np.testing.assert_array_equal(found["scale"], np.ones(len(ids)))


def test_candidates_are_the_pool_by_domain(signals):
    candidates = signals.candidates
    assert (candidates.num_rows, candidates.group_names) == (9, ("books", "code"))
    np.testing.assert_array_equal(candidates.groups, [0] * 5 + [1] * 4)
    assert_rows(candidates.sweep(Rows()), POOL, np.arange(9))


def test_each_domain_is_the_candidates_of_its_group(signals):
    assert len(signals.domains) == 2
    for k, (domain, ids) in enumerate(zip(signals.domains, (np.arange(5), np.arange(5, 9)), strict=True)):
        np.testing.assert_array_equal(ids, np.flatnonzero(signals.candidates.groups == k))
        assert (domain.num_rows, domain.group_names) == (len(ids), ("books", "code"))
        np.testing.assert_array_equal(domain.groups, [k] * len(ids))
        assert_rows(domain.sweep(Rows()), POOL, ids)
        # Places in the domain, not in the pool.
        places = np.array([3, 1])
        assert_rows(domain.sweep(Rows(), places), POOL, ids[places])


def test_targets_are_rows_of_their_own_in_named_groups(signals):
    targets = signals.targets
    assert (targets.num_rows, targets.group_names) == (3, TARGET_NAMES)
    np.testing.assert_array_equal(targets.groups, TARGET_GROUPS)
    assert_rows(targets.sweep(Rows()), TARGET_POOL, np.array(TARGET_IDS))
    assert_rows(targets.sweep(Rows(), np.array([2, 0])), TARGET_POOL, np.array(TARGET_IDS)[[2, 0]])


@pytest.mark.parametrize("ids", [[7], [8, 0, 3, 5, 1], [2, 2, 6, 2]])
def test_some_rows_come_in_the_order_that_they_are_asked_in(signals, ids):
    assert_rows(signals.candidates.sweep(Rows(), np.array(ids)), POOL, ids)


@pytest.mark.parametrize("ids", [[-1], [0, POOL.num_rows]])
def test_rows_that_there_are_not_are_refused(signals, ids):
    with pytest.raises(InputError, match=rf"^a sweep of row {ids[-1]} of candidates; there are rows 0 to "):
        signals.candidates.sweep(Rows(), ids=np.array(ids))


def test_a_model_alone_has_weight_one_and_what_it_is_not_given_is_missing():
    made = []
    signals = signals_of(Subject(build(MODEL)), targets=None, domain_gradients=lambda: made.append(1) or "gram")
    assert signals.targets is None
    assert signals.checkpoints == ((1.0, signals),)
    assert (signals.domain_gradients(), made) == ("gram", [1])


@pytest.mark.parametrize(
    ("ask", "asked"),
    [
        (lambda rows: rows.sweep(Embeddings(mean)), "embeddings"),
        (lambda rows: rows.texts(), "texts"),
    ],
    ids=["embeddings", "texts"],
)
def test_what_is_of_single_examples_is_refused_of_packed_rows(ask, asked):
    pool = pool_of(tasks=random_rows(6, 2)._replace(packed=True))
    targets = TargetSet(pool, np.arange(6), np.zeros(6, int), ("tasks",))
    mesh = make_mesh({}, jax.devices()[:1])
    signals = signals_of(Subject(build(MODEL)), targets=(targets, source(pool, mesh)))
    with pytest.raises(InputError, match=rf"^config\.data\.packing = True: {asked} of targets are of single examples"):
        ask(signals.targets)
