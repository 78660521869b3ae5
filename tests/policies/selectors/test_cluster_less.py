"""cluster_less against a NumPy transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import Embeddings, Evidence, Gradients, Projection
from dataflex_jax.policies.common import pooling
from dataflex_jax.policies.common.clustering import CLUSTERINGS, clustered
from dataflex_jax.policies.common.kmeans import kmeans
from dataflex_jax.policies.selectors import cluster_less as module
from dataflex_jax.policies.selectors.cluster_less import Clustered, cluster_less
from tests.helpers.fake_signals import FakeRows, FakeSignals, request
from tests.helpers.influences import GROUPS, NAMES, SIZE, transcribed

N, TOKENS, WIDTH = 60, 5, 6


def signals(seed=0):
    rng = np.random.default_rng(seed)
    hidden = (100 + rng.normal(size=(N, TOKENS, WIDTH))).astype(np.float32)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (N, 1))).astype(np.float32)
    candidates = FakeRows(preconditioned=rng.normal(size=(N, SIZE)), hidden=hidden, mask=mask)
    return FakeSignals(candidates, FakeRows(gradients=rng.normal(size=(len(GROUPS), SIZE)), groups=GROUPS, names=NAMES))


@pytest.mark.parametrize("how", ["mean", "last"])
def test_a_candidate_of_padding_only_is_in_no_cluster(how):
    source = signals()
    source.candidates.mask[7] = 0
    state = cluster_less(pooling=how).init(source)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(state["cluster"]) < 0), [7])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(state["distance"])), [7])


def test_init_clusters_the_pooled_hidden_states_once():
    source = signals()
    state = cluster_less(cluster_size=10, cluster_seed=3).init(source)
    points = pooling.mean(source.candidates.hidden, source.candidates.mask, normalised=False)
    cluster, distance, _ = kmeans(points, 6, jax.random.key(3))
    np.testing.assert_array_equal(state["cluster"], cluster)
    np.testing.assert_allclose(state["distance"], distance, rtol=1e-5)
    assert [type(signal) for signal in source.candidates.asked] == [Embeddings]
    assert source.targets.asked == []


def transcription(source, state, samples, target_agg, group_agg):
    """The score of each candidate's cluster, one cluster at a time."""
    cluster, distance = np.asarray(state["cluster"]), np.asarray(state["distance"])
    gradients = source.candidates.preconditioned.astype(np.float64)
    scores = np.full(N, np.nan)
    for k in set(cluster) - {-1}:
        members = [i for i in range(N) if cluster[i] == k]
        nearest = sorted(members, key=lambda i: (distance[i], i))[:samples]
        rows = [gradients[i] for i in nearest if np.isfinite(gradients[i]).all()]
        if rows:
            mean = np.mean(rows, axis=0)[None]
            influences = transcribed(mean, source.targets.gradients, GROUPS, target_agg)[0]
            scores[members] = influences.max() if group_agg == "max" else influences.mean()
    return scores


@pytest.mark.parametrize(("target_agg", "group_agg"), [("mean_of_cos", "max"), ("cos_of_mean", "mean")])
@pytest.mark.parametrize("rows_at_a_time", [4096, 7])
def test_scores_equal_the_transcription(monkeypatch, rows_at_a_time, target_agg, group_agg):
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", rows_at_a_time)
    source = signals()
    source.candidates.hidden[7] = np.nan
    selector = cluster_less(
        cluster_size=6, samples_per_cluster=3, projection="none", target_agg=target_agg, group_agg=group_agg
    )
    state = selector.init(source)
    # One representative without a gradient, and a cluster that has none with one.
    cluster = np.asarray(state["cluster"])
    order = np.lexsort((state["distance"], cluster))
    source.candidates.preconditioned[order[cluster[order] == 2][0]] = np.nan
    source.candidates.preconditioned[cluster == 4] = np.inf
    evidence, after = selector.score(state, source, request())
    assert after is state
    np.testing.assert_allclose(evidence.rows.score, transcription(source, state, 3, target_agg, group_agg), atol=2e-6)
    unscored = np.isnan(np.asarray(evidence.rows.score))
    np.testing.assert_array_equal(unscored, (cluster == 4) | (np.arange(N) == 7))
    assert cluster[7] == -1
    assert np.isnan(state["distance"][7])


def peers_order(members, distance, how):
    """A cluster's candidates, those first that represent it."""
    near = sorted(members, key=lambda i: (distance[i], i))
    if how == "mixed":
        return list(dict.fromkeys(i for pair in zip(near, near[::-1], strict=True) for i in pair))
    return near if how == "nearest" else sorted(members, key=lambda i: (-distance[i], i))


@pytest.mark.parametrize("how", ["nearest", "farthest", "mixed"])
@pytest.mark.parametrize("samples", [1, 2, 3, 100])
def test_representatives_are_the_peers(samples, how):
    rng = np.random.default_rng(samples)
    cluster = rng.choice([-1, 0, 1, 2, 4], 40)
    distance = np.where(cluster >= 0, rng.integers(0, 9, 40), np.nan).astype(np.float32)
    place = module.places(how, cluster, distance, request().key)
    clusters, chosen = module.first_members(cluster, place, samples)
    np.testing.assert_array_equal(clusters, [0, 1, 2, 4])
    for k, members in zip(clusters, chosen, strict=True):
        expected = peers_order(np.flatnonzero(cluster == k).tolist(), distance, how)[:samples]
        np.testing.assert_array_equal(members, expected)


def test_random_representatives_are_others_at_each_update_and_the_same_again():
    cluster, distance = np.repeat([0, -1, 1], 20), np.zeros(60, np.float32)
    drawn = [
        np.concatenate(module.first_members(cluster, module.places("random", cluster, distance, key), 5)[1]).tolist()
        for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [cluster[i] for i in drawn[0]] == [0] * 5 + [1] * 5
    assert len(set(drawn[0])) == 10


@pytest.mark.parametrize("clustering", CLUSTERINGS)
def test_candidates_are_clustered_as_asked_but_for_those_without_an_embedding(clustering):
    source = signals()
    source.candidates.hidden[7] = np.nan
    state = cluster_less(cluster_size=10, clustering=clustering).init(source)
    points = pooling.mean(source.candidates.hidden, source.candidates.mask, normalised=False)
    cluster, distance = clustered(clustering, jnp.delete(points, 7, axis=0), 6, jax.random.key(0), 50)
    np.testing.assert_array_equal(state["cluster"], np.insert(cluster, 7, -1))
    np.testing.assert_allclose(state["distance"], np.insert(distance, 7, np.nan), rtol=1e-4, atol=1e-5)


def test_the_representatives_asked_for_have_their_gradients_scored():
    source = signals()
    nearest, farthest = (
        cluster_less(cluster_size=10, samples_per_cluster=2, projection="none", representatives=how)
        for how in ("nearest", "farthest")
    )
    state = nearest.init(source)
    mirrored = state | {"distance": -state["distance"]}
    expected, found = nearest.score(mirrored, source, request())[0], farthest.score(state, source, request())[0]
    np.testing.assert_array_equal(found.rows.score, expected.rows.score)
    assert (found.rows.score != nearest.score(state, source, request())[0].rows.score).any()


def test_checkpoints_are_summed():
    source, other = signals(0), signals(1)
    selector = cluster_less(cluster_size=6, group_agg="mean")
    state = selector.init(source)
    first, second = (np.asarray(selector.score(state, s, request())[0].rows.score) for s in (source, other))
    source.checkpoints = ((1.0, source), (0.5, other))
    total, _ = selector.score(state, source, request())
    np.testing.assert_allclose(total.rows.score, first + 0.5 * second, atol=1e-6)


def test_whole_clusters_are_taken_nearest_first_and_the_last_is_cut():
    rows = Clustered(
        score=jnp.asarray([0.1, 0.5, 0.3, 0.5, 0.1, 0.3, 0.5, 0.5]),
        cluster=jnp.asarray([0, 1, 2, 1, 0, 2, 3, 1]),
        distance=jnp.asarray([1.0, 3.0, 2.0, 1.0, 0.5, 2.0, 0.1, 2.0]),
    )
    choose = jax.jit(cluster_less().choose, static_argnums=2)
    choice = choose(Evidence(rows), request(), 7)
    np.testing.assert_array_equal(choice.ids, [3, 7, 1, 6, 2, 5, 4])
    np.testing.assert_array_equal(choice.scores, rows.score[choice.ids])
    np.testing.assert_array_equal(choice.all_scores, rows.score)
    subset = jax.tree.map(lambda leaf: leaf[jnp.asarray([0, 2, 4, 7])], Evidence(rows))
    np.testing.assert_array_equal(choose(subset, request(), 3).ids, [3, 1, 2])


def test_nothing_to_cluster_by_is_refused():
    source = signals()
    source.candidates.hidden[:] = np.nan
    with pytest.raises(InputError, match="no candidate has a finite embedding"):
        cluster_less().init(source)


def test_auto_is_the_sketch_of_the_blocks():
    source = signals()
    selector = cluster_less(cluster_size=10, proj_dim=16)
    selector.score(selector.init(source), source, request())
    assert source.targets.asked == [Gradients(Projection("sketch", 16))]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("projection", "exact"),
        ("cluster_size", 0),
        ("samples_per_cluster", 0),
        ("kmeans_iterations", 0),
        ("pooling", "max"),
        ("clustering", "dbscan"),
        ("representatives", "best"),
        ("group_agg", "sum"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        cluster_less(**{option: value})
