"""tsds against a linear-programming solver, and the draws against their probabilities."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from dataflex_jax.policies import Evidence
from dataflex_jax.policies.common import pooling
from dataflex_jax.policies.selectors import tsds as tsds_module
from dataflex_jax.policies.selectors.tsds import Transported, transport, tsds
from tests.helpers.fake_signals import FakeRows, FakeSignals, request


def objective(distances, alpha, C, mass, cap):
    return alpha / C * (mass * distances).sum() + (1 - alpha) * len(distances) * cap


def solved(distances, densities, alpha, C):
    """The least value of the objective, by HiGHS."""
    m, k = distances.shape
    costs = np.append(alpha / C * distances.ravel(), (1 - alpha) * m)
    caps = np.hstack([np.diag(densities.ravel()), -np.ones((m * k, 1))])
    sums = np.hstack([np.kron(np.eye(m), np.ones(k)), np.zeros((m, 1))])
    result = linprog(costs, A_ub=caps, b_ub=np.zeros(m * k), A_eq=sums, b_eq=np.full(m, 1 / m), method="highs")
    assert result.success
    return result.fun


def problem(kind, seed):
    rng = np.random.default_rng(seed)
    m, k = rng.integers(1, 8), rng.integers(2, 12)
    distances = np.sort(rng.uniform(0, 1.4, (m, k)), axis=1)
    densities = rng.uniform(1, 6, (m, k))
    alpha, C = rng.uniform(0.1, 0.99), rng.uniform(0.1, 8)
    if kind == "no density":
        densities[:] = 1
    if kind == "near-duplicates":
        densities[0], distances[0] = rng.uniform(200, 400, k), 1e-3
    if kind == "max_k binds":
        alpha, C = 0.05, 5.0
    if kind == "ties":
        distances = np.round(distances, 1)
    return distances, densities, alpha, C


KINDS = ("plain", "no density", "near-duplicates", "max_k binds", "ties")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_the_plan_is_optimal(kind, seed):
    distances, densities, alpha, C = problem(kind, seed)
    plan = transport(distances, densities, alpha, C)
    np.testing.assert_allclose(plan.mass.sum(axis=1), 1 / len(distances), rtol=1e-12)
    assert (plan.mass >= 0).all()
    assert (plan.mass * densities <= plan.cap * (1 + 1e-9)).all()
    reached = objective(distances, alpha, C, plan.mass, plan.cap)
    np.testing.assert_allclose(reached, solved(distances, densities, alpha, C), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_the_same_however_many_neighbours_are_looked_at_first(monkeypatch, kind):
    for seed in range(5):
        distances, densities, alpha, C = problem(kind, seed)
        whole = transport(distances, densities, alpha, C)
        monkeypatch.setattr(tsds_module, "_NEIGHBOURS", 2)
        plan = transport(distances, densities, alpha, C)
        monkeypatch.undo()
        width = plan.mass.shape[1]
        np.testing.assert_allclose(plan.mass, whole.mass[:, :width], atol=1e-12)
        assert not whole.mass[:, width:].any()
        assert (plan.cap, plan.bound) == (pytest.approx(whole.cap), whole.bound)


def test_the_problems_have_both_branches():
    bound = {kind: [transport(*problem(kind, seed)).bound for seed in range(5)] for kind in KINDS}
    assert all(bound["max_k binds"])
    assert not all(bound["plain"])


@pytest.mark.parametrize(("alpha", "bound"), [(0.0, True), (1.0, False)])
def test_the_ends_of_alpha(alpha, bound):
    distances, densities, _, C = problem("plain", 3)
    plan = transport(distances, densities, alpha, C)
    assert plan.bound == bound
    reached = objective(distances, alpha, C, plan.mass, plan.cap)
    np.testing.assert_allclose(reached, solved(distances, densities, alpha, C), atol=1e-9)
    if alpha == 1:
        np.testing.assert_allclose(plan.mass[:, 0], 1 / len(distances))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_one_neighbour_has_all(alpha):
    plan = transport(np.asarray([[0.3], [0.1]]), np.asarray([[2.0], [1.0]]), alpha, 5.0)
    np.testing.assert_array_equal(plan.mass, [[0.5], [0.5]])
    assert (plan.cap, plan.bound) == (1.0, alpha < 1)


N, M, TOKENS, WIDTH = 120, 4, 3, 5


def signals():
    rng = np.random.default_rng(0)

    def rows(n):
        return FakeRows(hidden=rng.normal(size=(n, TOKENS, WIDTH)).astype(np.float32), mask=np.ones((n, TOKENS)))

    return FakeSignals(rows(N), rows(M))


def transcription(source, k, sigma, kde_k, alpha, C):
    """The probabilities, in float64, given the optimum of a plan."""
    targets, candidates = (
        np.asarray(pooling.mean(r.hidden, r.mask), np.float64) for r in (source.targets, source.candidates)
    )
    d = np.linalg.norm(targets[:, None] - candidates[None], axis=2)
    ids = np.argsort(d, axis=1, kind="stable")[:, :k]
    union = np.unique(ids)
    density = np.ones(len(candidates))
    for i in union if sigma else ():
        squares = np.sort(((candidates[union] - candidates[i]) ** 2).sum(axis=1))[:kde_k]
        density[i] = np.maximum(0, 1 - squares / sigma**2).sum()
    plan = transport(np.take_along_axis(d, ids, axis=1), density[ids], alpha, C)
    p = np.zeros(len(candidates))
    np.add.at(p, ids, plan.mass)
    return p, d.min(axis=0)


@pytest.mark.parametrize(("sigma", "kde_k", "alpha"), [(0.75, 1000, 0.6), (0.0, 5, 0.9), (1.0, 3, 0.95)])
def test_probabilities_equal_the_transcription(sigma, kde_k, alpha):
    source = signals()
    selector = tsds(sigma=sigma, kde_k=kde_k, alpha=alpha)
    evidence, state = selector.score({}, source, request())
    assert state == {}
    p, closest = transcription(source, N // 10, sigma, min(kde_k, N // 10), alpha, 5.0)
    np.testing.assert_allclose(evidence.rows.probability, p, atol=1e-5)
    np.testing.assert_allclose(evidence.rows.distance, closest, rtol=1e-4)
    assert evidence.rows.probability.sum() == pytest.approx(1, abs=1e-6)


def test_near_duplicates_share_the_mass_of_one():
    """Where mass is spread as evenly as it can be, eight copies have in all what each of four single rows has."""
    source = signals()
    target = source.targets.hidden[:1, :1]
    source.targets.hidden[:] = target
    source.candidates.hidden[:] = -target
    rng = np.random.default_rng(1)
    source.candidates.hidden[:8] = target + 0.3 * rng.normal(size=WIDTH)
    source.candidates.hidden[8:12] = target + 0.3 * rng.normal(size=(4, 1, WIDTH))
    evidence, _ = tsds(sigma=0.02, alpha=0.0).score({}, source, request())
    p = evidence.rows.probability
    np.testing.assert_allclose(p[8:12], 0.2, rtol=0.02)
    assert p[:8].sum() == pytest.approx(0.2, rel=0.02)


def test_clamped_numbers_and_a_max_k_that_binds_are_said_once(caplog):
    selector, source = tsds(alpha=0.05), signals()
    with caplog.at_level(logging.WARNING):
        first, again = (selector.score({}, source, request())[0].rows for _ in range(2))
    np.testing.assert_array_equal(first.probability, again.probability)
    assert [record.getMessage() for record in caplog.records] == [
        "tsds: max_k = 5000 is more than a tenth of the 120 candidates with an embedding; it is 12.",
        "tsds: kde_k = 1000 is more than a tenth of the 120 candidates with an embedding; it is 12.",
        "tsds: max_k binds: the mass of a target would be spread over more neighbours than it has.",
    ]


def test_rows_without_an_embedding_have_no_mass_and_are_marked():
    source = signals()
    source.candidates.hidden[[3, 4]] = np.nan
    source.candidates.mask[7] = 0
    source.targets.hidden[0] = np.nan
    evidence, _ = tsds().score({}, source, request())
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(evidence.rows.distance)), [3, 4, 7])
    assert evidence.rows.probability[[3, 4, 7]].sum() == 0
    assert evidence.rows.probability.sum() == pytest.approx(1, abs=1e-6)


def some_evidence():
    p = jnp.asarray([0.0, 0.5, 0.1, 0.0, 0.4, 0.0])
    return Evidence(Transported(p, jnp.asarray([0.9, 0.1, 0.2, 0.7, 0.1, 0.8])))


def choose(selector, evidence, num, seed=0):
    return jax.jit(selector.choose, static_argnums=2)(evidence, request(seed=seed), num)


def test_without_replacement_the_rest_follows_by_distance():
    for seed in range(10):
        ids = np.asarray(choose(tsds(), some_evidence(), 6, seed).ids)
        assert set(ids[:3]) == {1, 2, 4}
        np.testing.assert_array_equal(ids[3:], [3, 5, 0])


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_have_their_probabilities(replacement):
    selector = tsds(replacement=replacement)
    assert selector.replacement == replacement
    keys = jax.vmap(lambda seed: jax.random.key(seed))(jnp.arange(4000))
    evidence = some_evidence()
    first = jax.vmap(lambda key: selector.choose(evidence, request()._replace(key=key), 1).ids[0])(keys)
    shares = np.bincount(first, minlength=6) / 4000
    np.testing.assert_allclose(shares, evidence.rows.probability, atol=0.03)
    assert (shares[[0, 3, 5]] == 0).all()


def test_a_choice_is_reproducible():
    for selector in (tsds(), tsds(replacement=True)):
        first, again, other = (choose(selector, some_evidence(), 5, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first.ids, again.ids)
        np.testing.assert_array_equal(first.scores, first.all_scores[first.ids])
        assert first.ids.tolist() != other.ids.tolist()
    drawn = choose(tsds(replacement=True), some_evidence(), 500)
    np.testing.assert_allclose(np.bincount(drawn.ids, minlength=6) / 500, drawn.all_scores, atol=0.08)


@pytest.mark.parametrize("replacement", [False, True])
def test_in_a_domain_without_any_mass_there_is_a_choice(replacement):
    evidence = Evidence(jax.tree.map(lambda leaf: leaf[jnp.asarray([0, 3, 5])], some_evidence().rows))
    ids = np.asarray(choose(tsds(replacement=replacement), evidence, 30 if replacement else 3).ids)
    assert set(ids) == {0, 1, 2}
    if not replacement:
        np.testing.assert_array_equal(ids, [1, 2, 0])


@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha", 1.1), ("C", 0.0), ("sigma", -1.0), ("max_k", 0), ("kde_k", 0), ("pooling", "max")],
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        tsds(**{option: value})
