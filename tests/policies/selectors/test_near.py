"""near against a transcription that goes through the ranks one by one."""

import logging

import jax
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import Evidence
from dataflex_jax.policies.common import pooling
from dataflex_jax.policies.selectors.near import near
from tests.helpers.fake_signals import FakeRows, FakeSignals, request

N, M, TOKENS, WIDTH = 60, 5, 4, 6


def rows(n, seed, groups=None):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, TOKENS, WIDTH)).astype(np.float32)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (n, 1))).astype(np.float32)
    return FakeRows(hidden=hidden, mask=mask, groups=groups)


def signals(seed=0):
    return FakeSignals(rows(N, seed), rows(M, seed + 100))


def distances(source, pooled=pooling.mean):
    """Between targets and candidates, in float64, [M, N]."""
    targets, candidates = (
        np.asarray(pooled(r.hidden, r.mask), np.float64) for r in (source.targets, source.candidates)
    )
    return np.linalg.norm(targets[:, None] - candidates[None], axis=2)


def transcription(d, max_k):
    """All candidates in the order taken."""
    order = np.argsort(d, axis=1, kind="stable")
    taken = []
    for rank in range(max_k):
        level = {}
        for target, ids in enumerate(order):
            level[ids[rank]] = min(d[target, ids[rank]], level.get(ids[rank], np.inf))
        taken += [i for i in sorted(level, key=lambda i: (level[i], i)) if i not in taken]
    rest = [i for i in range(d.shape[1]) if i not in taken]
    return taken + sorted(rest, key=lambda i: (d[:, i].min(), i))


def chosen(selector, evidence, num):
    return jax.jit(selector.choose, static_argnums=2)(evidence, request(), num)


@pytest.mark.parametrize("max_k", [1, 4, N])
def test_equals_the_transcription(max_k):
    source, selector = signals(), near(max_k=max_k)
    evidence, state = selector.score({}, source, request())
    assert state == {}
    choice = chosen(selector, evidence, N)
    np.testing.assert_array_equal(choice.ids, transcription(distances(source), max_k))
    assert (np.diff(choice.scores) <= 0).all()
    np.testing.assert_array_equal(choice.scores, choice.all_scores[choice.ids])
    np.testing.assert_array_equal(chosen(selector, evidence, 7).ids, choice.ids[:7])


@pytest.mark.parametrize(
    ("how", "pooled"), [("last", pooling.last_token), ("position_weighted", pooling.position_weighted_mean)]
)
def test_embeddings_by_other_poolings(how, pooled):
    source, selector = signals(), near(pooling=how)
    evidence, _ = selector.score({}, source, request())
    np.testing.assert_array_equal(chosen(selector, evidence, N).ids, transcription(distances(source, pooled), N))


def test_inside_a_domain_the_ranks_of_the_pool_decide():
    source, selector = signals(), near(max_k=10)
    evidence, _ = selector.score({}, source, request())
    part = np.arange(20, 45)
    choice = chosen(selector, Evidence(jax.tree.map(lambda leaf: leaf[part], evidence.rows)), 9)
    expected = [i for i in transcription(distances(source), 10) if i in part]
    np.testing.assert_array_equal(part[choice.ids], expected[:9])


def test_equal_candidates_come_in_incoming_order():
    source, selector = signals(), near()
    source.candidates.hidden[:], source.candidates.mask[:] = source.candidates.hidden[3], source.candidates.mask[3]
    evidence, _ = selector.score({}, source, request())
    np.testing.assert_array_equal(chosen(selector, evidence, N).ids, np.arange(N))


def test_rows_without_an_embedding_are_left_out():
    source, selector = signals(), near()
    source.candidates.mask[5] = 0
    source.candidates.hidden[9] = np.nan
    source.targets.hidden[0] = np.nan
    source.targets.mask[1] = 0
    evidence, _ = selector.score({}, source, request())
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(evidence.rows.distance)), [5, 9])
    d = distances(source)[2:]
    d[:, [5, 9]] = np.inf
    expected = [i for i in transcription(d, N - 2) if i not in (5, 9)]
    np.testing.assert_array_equal(chosen(selector, evidence, N - 2).ids, expected)


def test_too_large_a_max_k_is_said_once(caplog):
    source, selector = signals(), near(max_k=N + 1)
    with caplog.at_level(logging.WARNING):
        first, again = (selector.score({}, source, request())[0].rows for _ in range(2))
    np.testing.assert_array_equal(first.rank, again.rank)
    np.testing.assert_array_equal(first.distance, again.distance)
    assert [r.getMessage() for r in caplog.records] == [
        "near: max_k = 61 is more than the 60 candidates with an embedding; all of them are ranked."
    ]


@pytest.mark.parametrize("what", ["target", "candidate"])
def test_nothing_to_look_for_or_among_is_refused(what):
    source = signals()
    getattr(source, f"{what}s").hidden[:] = np.nan
    with pytest.raises(InputError, match=f"selector 'near': no {what} has an embedding"):
        near().score({}, source, request())
    with pytest.raises(InputError, match="needs a target set"):
        near().score({}, FakeSignals(source.candidates), request())


@pytest.mark.parametrize(("option", "value"), [("max_k", 0), ("pooling", "max")])
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        near(**{option: value})
