"""ICONS against a transcription of its votes."""

import jax
import numpy as np
import pytest

from dataflex_jax.policies import Evidence
from dataflex_jax.policies.selectors.icons import icons
from dataflex_jax.policies.selectors.less import less
from tests.helpers.fake_signals import FakeRows, FakeSignals, request
from tests.helpers.influences import GROUPS, signals, transcribed


def transcription(influences, num):
    """(ids, votes) with quantiles in float64."""
    n, num_groups = influences.shape
    votes = np.zeros(n, int)
    for k in range(num_groups):
        votes += influences[:, k] >= np.quantile(influences[:, k].astype(np.float64), 1 - num / n)
    means = influences.mean(axis=1, dtype=np.float64)
    return sorted(range(n), key=lambda i: (-votes[i], -means[i], i))[:num], votes


@pytest.mark.parametrize("n", [5, 40, 211])
@pytest.mark.parametrize("num_groups", [1, 2, 9])
def test_a_choice_equals_the_transcription(n, num_groups):
    influences = np.random.default_rng(n).normal(size=(n, num_groups)).astype(np.float32)
    # Sums of the same numbers in another order may differ, so ties of means are whole rows repeated.
    influences[n // 2] = influences[0]
    choose = jax.jit(icons().choose, static_argnums=2)
    for num in (1, n // 3, n - 1, n):
        choice = choose(Evidence(influences), request(), num)
        ids, votes = transcription(influences, num)
        np.testing.assert_array_equal(choice.ids, ids)
        np.testing.assert_array_equal(np.floor(choice.all_scores), votes)
        np.testing.assert_array_equal(np.argsort(-choice.all_scores, stable=True)[:num], ids)
        np.testing.assert_array_equal(choice.scores, choice.all_scores[choice.ids])


def test_votes_come_before_the_mean():
    """Candidate 0 is above the threshold of two groups of three, candidate 1 far above in one."""
    influences = np.array([[0.5, 0.5, -0.9], [0.0, 0.0, 0.9], [0.1, 0.1, 0.1], [-0.5, 0.2, 0.2]], np.float32)
    np.testing.assert_array_equal(icons().choose(Evidence(influences), request(), 1).ids, [0])


def test_evidence_is_the_influence_on_each_group():
    source = signals()
    source.candidates.preconditioned[3] = 0
    evidence, _ = icons(projection="none").score({}, source, request())
    keep = np.arange(23) != 3
    candidates, targets = source.candidates.preconditioned[keep], source.targets.gradients
    expected = transcribed(candidates, targets, GROUPS, "mean_of_cos")
    np.testing.assert_allclose(evidence.rows[keep], expected, atol=2e-6)
    assert np.isnan(evidence.rows[3]).all()


def test_one_group_is_less():
    source = signals()
    one = FakeSignals(source.candidates, FakeRows(gradients=source.targets.gradients))
    evidence, _ = icons(projection="none").score({}, one, request())
    scores, _ = less(projection="none", group_agg="mean").score({}, one, request())
    chosen = less().choose(scores, request(), 8).ids
    np.testing.assert_array_equal(icons().choose(evidence, request(), 8).ids, chosen)


def test_checkpoints_are_summed():
    source, other = signals(0), signals(1)
    (first, _), (second, _) = (icons().score({}, s, request()) for s in (source, other))
    source.checkpoints = ((1.0, source), (0.5, other))
    total, _ = icons().score({}, source, request())
    np.testing.assert_allclose(total.rows, first.rows + 0.5 * second.rows, atol=1e-6)


def test_impossible_hyperparameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^projection = "):
        icons(projection="kronecker")
