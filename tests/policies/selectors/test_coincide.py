"""coincide against a transcription of its definition, in float64."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import Evidence
from dataflex_jax.policies.common.kmeans import spherical_kmeans
from dataflex_jax.policies.selectors.coincide import coincide, shared_out, transferability
from tests.helpers.fake_signals import FakeRows, FakeSignals, request
from tests.policies.common.test_herding import transcription as inside

N, LAYERS, TOKENS, WIDTH = 60, 6, 4, 5


def signals(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(1, 1, (N, LAYERS, TOKENS, WIDTH)).astype(np.float32)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (N, 1))).astype(np.float32)
    return FakeSignals(FakeRows(hidden=hidden, mask=mask))


def features(source, layers):
    """Of hidden layers counted from 1, in float64, one candidate and layer at a time."""
    rows = []
    for hidden, mask in zip(source.candidates.hidden, source.candidates.mask, strict=True):
        parts = [np.tanh(hidden[layer - 1, mask > 0].astype(np.float64)).mean(axis=0) for layer in layers]
        together = np.concatenate([part / np.linalg.norm(part) for part in parts]) / np.sqrt(len(layers))
        rows.append(together / np.linalg.norm(together))
    return np.stack(rows)


def shares(exponents, sizes, num):
    """Filling clusters up in turn, whose number is what is left to be shared out among the others."""
    exponents, sizes = np.asarray(exponents, np.float64), np.asarray(sizes)
    full, quotas = np.zeros(len(sizes), bool), np.zeros(len(sizes))
    weights = np.exp(exponents - exponents[sizes > 0].max())
    while True:
        left = num - sizes[full].sum()
        quotas = np.where(full, sizes, 0.0)
        quotas[~full] = left * weights[~full] / max(weights[~full].sum(), 1e-300)
        over = ~full & (quotas > sizes)
        if not over.any():
            break
        # The one that is filled first.
        full[np.argmin(np.where(over, sizes / weights, np.inf))] = True
    counts = np.floor(np.round(quotas, 9)).astype(int)
    for cluster in np.argsort(-(quotas - counts), kind="stable")[: num - counts.sum()]:
        counts[cluster] += 1
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_shares_equal_the_transcription(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    sizes, exponents = rng.integers(0, 9, count), rng.normal(0, [0.1, 1, 5][seed % 3], count)
    sizes[0] += 1
    for num in {1, int(sizes.sum()) // 3 + 1, int(sizes.sum())}:
        found = np.asarray(jax.jit(shared_out, static_argnums=2)(jnp.asarray(exponents), jnp.asarray(sizes), num))
        assert found.sum() == num
        assert (found <= sizes).all()
        np.testing.assert_array_equal(found, shares(exponents, sizes, num))


def test_shares_far_apart_are_still_all_given_out():
    exponents, sizes = jnp.asarray([0.0, -900.0, -1000.0, -jnp.inf]), jnp.asarray([3, 4, 5, 0])
    assert shared_out(exponents, sizes, 2).tolist() == [2, 0, 0, 0]
    assert shared_out(exponents, sizes, 12).tolist() == [3, 4, 5, 0]


def test_transferability_is_the_mean_cosine_with_the_others():
    centroids = np.asarray([[2, 0], [0, 3], [1, 1], [5, -1]], np.float32)
    found = transferability(centroids, np.asarray([4, 1, 2, 0]))
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [half / 2, half / 2, half, -np.inf])
    np.testing.assert_array_equal(transferability(centroids[:1], np.asarray([3])), [0])


@pytest.mark.parametrize("num", [1, 17, N])
def test_equals_the_transcription(num):
    source, selector = signals(), coincide(num_clusters=7, layers=2, tau=0.3)
    evidence, state = selector.score({}, source, request())
    assert state == {}
    choice = jax.jit(selector.choose, static_argnums=2)(evidence, request(), num)
    points = features(source, [2, 4])
    cluster, _, centroids = spherical_kmeans(points.astype(np.float32), 7, jax.random.key(0), 10, reseed=True)
    cluster, centroids = np.asarray(cluster), np.asarray(centroids, np.float64)
    density, place = inside(points, cluster, 7)
    cosines = centroids @ centroids.T / np.outer(*[np.linalg.norm(centroids, axis=1)] * 2)
    exponents = (cosines.sum(axis=1) - 1) / 6 / (0.3 * density)
    counts = shares(exponents, np.bincount(cluster, minlength=7), num)
    assert set(choice.ids.tolist()) == set(np.flatnonzero(place < counts[cluster]).tolist())
    np.testing.assert_array_equal(choice.scores, np.sort(choice.all_scores)[::-1][:num])
    assert (choice.scores > 0).all()
    assert np.sum(np.asarray(choice.all_scores) > 0) == num


def test_a_choice_inside_a_domain_takes_its_clusters_members_in_the_same_order():
    source, selector = signals(), coincide(num_clusters=4)
    evidence, _ = selector.score({}, source, request())
    part = np.arange(15, 50)
    rows = jax.tree.map(lambda leaf: leaf[part], evidence.rows)
    ids = np.asarray(selector.choose(Evidence(rows, evidence.shared), request(), 12).ids)
    sizes = np.bincount(rows.cluster, minlength=4)
    taken = np.bincount(rows.cluster[ids], minlength=4)
    np.testing.assert_array_equal(taken, shares(evidence.shared, sizes, 12))
    for number in range(4):
        members = np.flatnonzero(rows.cluster == number)
        first = members[np.argsort(rows.place[members])][: taken[number]]
        assert set(first) == set(ids[rows.cluster[ids] == number])


def test_candidates_without_features_are_left_out_and_fewer_clusters_are_said_once(caplog):
    source, selector = signals(), coincide()
    source.candidates.hidden[9] = np.nan
    source.candidates.mask[5] = 0
    with caplog.at_level(logging.WARNING):
        first, again = (selector.score({}, source, request())[0] for _ in range(2))
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(first.rows.place)), [5, 9])
    jax.tree.map(np.testing.assert_array_equal, first, again)
    message = "coincide: num_clusters = 10000 is more than the 58 candidates with features; it is that."
    assert [record.getMessage() for record in caplog.records] == [message]
    source.candidates.hidden[:] = np.nan
    with pytest.raises(InputError, match="selector 'coincide': no candidate has features"):
        selector.score({}, source, request())


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_clusters", 0), ("layers", 0), ("tau", 0.0), ("kmeans_iterations", -1), ("cluster_seed", -1)],
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        coincide(**{option: value})
