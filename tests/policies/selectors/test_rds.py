"""RDS+ against a NumPy transcription of its rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import EXAMPLES, TARGETS, Evidence
from dataflex_jax.policies.selectors.rds import rds
from dataflex_jax.signals.registry import Subject
from tests.helpers.array_rows import TARGET_GROUPS, TARGET_IDS, TARGET_POOL, signals_of, whole_batch
from tests.helpers.fake_signals import FakeRows, FakeSignals, request
from tests.helpers.gradient_model import MODEL, build
from tests.helpers.hidden_states import pooled
from tests.helpers.influences import GROUPS, NAMES

N, TOKENS, WIDTH = 23, 5, 6
SIZES = np.array([4, 4, 2], np.int32)  # of GROUPS


def hidden_rows(rng, n, **groups):
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (n, 1))).astype(np.float32)
    return FakeRows(hidden=rng.normal(size=(n, TOKENS, WIDTH)).astype(np.float32), mask=mask, **groups)


def signals(seed=0):
    rng = np.random.default_rng(seed)
    return FakeSignals(hidden_rows(rng, N), hidden_rows(rng, len(GROUPS), groups=GROUPS, names=NAMES))


def cosines_by_group(source, how="position_weighted_mean", groups=GROUPS):
    candidates, targets = (pooled(rows.hidden, rows.mask, how) for rows in (source.candidates, source.targets))
    return candidates @ targets[np.argsort(groups, kind="stable")].T


def scored(source, **options):
    return rds(tokens="inputs", **options).score({}, source, request())[0]


def transcription(similarities, groups, num):
    """Rounds over the groups, in each of them over its targets; similarities [n, M] in the targets' own order."""
    left = list(range(len(similarities)))
    queues = [[m for m, g in enumerate(groups) if g == group] for group in range(max(groups) + 1)]
    ids = []
    while True:
        for queue in queues:
            target = queue.pop(0)
            queue.append(target)
            best = min(left, key=lambda i: (-similarities[i, target], i))
            left.remove(best)
            ids.append(best)
            if len(ids) == num:
                return ids


@pytest.mark.parametrize("groups", [[0], [0, 0, 0], [0, 1, 2], GROUPS, [1, 0, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("n", [5, 211])
def test_a_choice_equals_the_transcription(n, groups):
    similarities = np.random.default_rng(n).normal(size=(n, len(groups))).astype(np.float32).round(1)  # many are equal
    evidence = Evidence(similarities[:, np.argsort(groups, kind="stable")], np.bincount(groups))
    choose = jax.jit(rds().choose, static_argnums=2)
    for num in (n // 3, n):
        choice = choose(evidence, request(), num)
        np.testing.assert_array_equal(choice.ids, transcription(similarities, groups, num))
        np.testing.assert_array_equal(choice.all_scores, similarities.max(axis=1))
        np.testing.assert_array_equal(choice.scores, choice.all_scores[choice.ids])


def test_in_a_domain_the_targets_choose_among_its_rows_alone():
    similarities = np.random.default_rng(0).normal(size=(30, len(GROUPS))).astype(np.float32)
    by_group, domain = np.argsort(GROUPS, kind="stable"), np.arange(1, 30, 3)
    evidence = Evidence(jnp.asarray(similarities[np.ix_(domain, by_group)]), jnp.asarray(SIZES))
    ids = rds().choose(evidence, request(), 7).ids
    np.testing.assert_array_equal(ids, transcription(similarities[domain], GROUPS, 7))


def test_a_target_that_nobody_is_like_has_its_turns_all_the_same():
    similarities = np.array([[0.9, -0.9], [0.8, -0.8], [0.7, -0.7]], np.float32)
    choice = rds().choose(Evidence(jnp.asarray(similarities), jnp.asarray([1, 1])), request(), 2)
    np.testing.assert_array_equal(choice.ids, [0, 2])


@pytest.mark.parametrize(
    ("pooling", "how"),
    [("position_weighted", "position_weighted_mean"), ("mean", "mean"), ("last", "last_token")],
)
def test_evidence_is_the_cosines_with_the_targets_group_by_group(pooling, how):
    source = signals()
    evidence = scored(source, pooling=pooling)
    np.testing.assert_allclose(evidence.rows, cosines_by_group(source, how), atol=1e-6)
    np.testing.assert_array_equal(evidence.shared, SIZES)


def test_a_candidate_without_an_embedding_is_not_finite_and_a_target_without_has_no_turn():
    source = signals()
    expected = cosines_by_group(source)
    source.candidates.mask[3] = 0
    source.candidates.hidden[8] = np.inf
    source.targets.mask[GROUPS.index(1)] = 0
    source.targets.hidden[GROUPS.index(2)] = np.nan
    evidence = scored(source)
    kept = np.delete(np.arange(len(GROUPS)), [SIZES[0], SIZES[0] + SIZES[1]])
    finite = np.delete(np.arange(N), [3, 8])
    np.testing.assert_allclose(evidence.rows[finite], expected[np.ix_(finite, kept)], atol=1e-6)
    assert np.isnan(evidence.rows[[3, 8]]).all()
    np.testing.assert_array_equal(evidence.shared, SIZES - [0, 1, 1])


def test_a_group_without_any_embedding_is_refused_by_name():
    source = signals()
    source.targets.mask[np.asarray(GROUPS) == 1] = 0
    with pytest.raises(InputError, match="no target of group 'botany' has a finite embedding"):
        scored(source)


def test_checkpoints_are_summed_and_a_target_counts_that_all_can_embed():
    source, other = signals(0), signals(1)
    expected = cosines_by_group(source) + 0.5 * cosines_by_group(other)
    other.targets.mask[0] = 0
    source.checkpoints = ((1.0, source), (0.5, other))
    evidence = scored(source)
    np.testing.assert_allclose(evidence.rows, expected[:, 1:], atol=1e-6)
    np.testing.assert_array_equal(evidence.shared, SIZES - [1, 0, 0])


def test_of_a_model_the_last_token_is_embedded_too():
    model = build(MODEL)

    def embedded(batch):
        seen = batch.with_last_inputs()
        hidden = np.asarray(model.hidden_states(seen), np.float64)
        return pooled(hidden, np.asarray(seen.real_inputs), "position_weighted_mean")

    evidence, _ = rds().score({}, signals_of(Subject(model), rows=9), request())
    targets = embedded(whole_batch(TARGET_POOL))[list(TARGET_IDS)]
    np.testing.assert_allclose(evidence.rows, embedded(whole_batch()) @ targets.T, atol=1e-5)
    np.testing.assert_array_equal(evidence.shared, np.bincount(TARGET_GROUPS))


def test_without_targets_it_is_refused():
    assert rds().needs == {TARGETS, EXAMPLES}
    with pytest.raises(InputError, match="'rds' needs a target set"):
        scored(FakeSignals(signals().candidates))


@pytest.mark.parametrize(("option", "value"), [("pooling", "max"), ("tokens", "some")])
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        rds(**{option: value})
