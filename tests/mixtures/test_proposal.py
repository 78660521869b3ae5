"""The proposal: SciPy's minimum, the planted optimum, the prior where nothing is known, and the caps."""

import numpy as np
import pytest
from scipy.optimize import minimize

from dataflex_jax.errors import InputError
from dataflex_jax.mixtures import fitting, law, proposal
from tests.mixtures import planted


def transcribed(of, weights, prior):
    rises = [np.exp(sum(a * w for a, w in zip(slopes, weights, strict=True))) for slopes in of.slopes]
    divergence = sum(w * np.log(w / p) for w, p in zip(weights, prior, strict=True) if w > 0)
    return np.mean(rises) + 0.05 * divergence


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limited", [False, True])
def test_it_is_the_minimum(seed, limited):
    of, prior = planted.law(seed), np.random.default_rng(seed).dirichlet(np.ones(5))
    most = np.minimum(1.5 * prior + 0.02, 1) if limited else np.ones(5)
    ours = proposal.propose(of, prior, most)
    theirs = minimize(
        lambda w: transcribed(of, np.maximum(w, 1e-14), prior),
        prior,
        bounds=[(1e-12, cap) for cap in most],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 1000},
    )
    assert ours.sum() == pytest.approx(1, abs=1e-12)
    assert (ours >= 0).all()
    assert (ours <= most + 1e-9).all()
    assert transcribed(of, ours, prior) <= theirs.fun + 1e-8
    np.testing.assert_allclose(ours, theirs.x, atol=1e-3)


def test_regret_on_a_planted_problem_is_below_a_hundredth_of_the_natural_mixtures():
    prior, truth = planted.prior(), planted.law()
    runs = planted.runs(64, 0.01)
    found = fitting.found(runs, prior, np.ones(5), seed=0)
    best = proposal.objective(truth, proposal.propose(truth, prior), prior)
    regret = proposal.objective(truth, found.proposal, prior) - best
    assert regret < 0.01 * (proposal.objective(truth, prior, prior) - best)


def test_of_noise_the_prior_is_proposed_and_said_so(caplog):
    runs = planted.runs(32, 0.3, values_of=lambda weights: np.full((len(weights), 3), 2.0))
    found = fitting.found(runs, planted.prior(), np.ones(5), seed=0)
    np.testing.assert_allclose(found.proposal, planted.prior(), atol=1e-6)
    assert "no better than the mean does, of a, b, c: nothing is left, and the prior is proposed" in caplog.text


def test_a_metric_that_is_not_foretold_does_not_move_it():
    counted = np.array([True, False, True])
    of = planted.law()
    same = law.Law(of.floors, np.where(counted[:, None], of.slopes, 0.0))
    prior = planted.prior()
    np.testing.assert_allclose(proposal.propose(of, prior, None, counted), proposal.propose(same, prior), atol=1e-7)


def test_a_domain_without_weight_in_the_prior_stays_out():
    prior = np.array([0.5, 0.5, 0.0, 0.0, 0.0])
    weights = proposal.propose(planted.law(), prior)
    assert (weights[2:] == 0).all()
    assert weights.sum() == pytest.approx(1)


def test_caps_are_four_epochs_of_the_tokens():
    np.testing.assert_allclose(proposal.caps(np.array([10.0, 100.0]), 160.0), [0.25, 1.0])
    np.testing.assert_allclose(proposal.caps(np.array([10.0, 100.0]), None), [1.0, 1.0])
    with pytest.raises(InputError, match=r"^--target_tokens=1000: the domains have 110 tokens, and each is taken 4 ti"):
        proposal.caps(np.array([10.0, 100.0]), 1000.0)


def test_caps_that_leave_one_mixture_are_that_mixture():
    most = np.array([0.2, 0.2, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(proposal.propose(planted.law(), planted.prior(), most), most)
