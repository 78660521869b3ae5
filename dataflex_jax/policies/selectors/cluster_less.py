"""LESS over clusters: a few gradients stand for a cluster of similar candidates."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dataflex_jax.errors import InputError
from dataflex_jax.policies import (
    EXAMPLES,
    Choice,
    Embeddings,
    Evidence,
    Request,
    Selector,
    Signals,
    options,
    register_selector,
)
from dataflex_jax.policies.common import pooling as poolings
from dataflex_jax.policies.common.clustering import CLUSTERINGS, clustered
from dataflex_jax.policies.common.influence import Influence, InfluenceOptions, aggregate, cosines, directions

REPRESENTATIVES = ("nearest", "farthest", "random", "mixed")
# Projected gradients that are held at a time, 128 MiB at the default proj_dim.
_ROWS_AT_A_TIME = 4096
_cosines = jax.jit(cosines)
# A row of padding only has no place among the others, so that it must not have the finite one that 0 would be.
_POOLINGS = {
    "mean": functools.partial(poolings.mean, normalised=False, empty=np.nan),
    "last": functools.partial(poolings.last_token, normalised=False, empty=np.nan),
}


class Clustered(NamedTuple):
    """What the choice depends on, of each candidate.

    Attributes:
        score: float32 [n], of each candidate's cluster; NaN where it has none.
        cluster: int32 [n], its number.
        distance: float32 [n], from the cluster's centroid.
    """

    score: Float[Array, " n"]
    cluster: Int[Array, " n"]
    distance: Float[Array, " n"]


@register_selector("cluster_less")
@options.including(InfluenceOptions)
def cluster_less(
    shared: InfluenceOptions,
    *,
    cluster_size: int = 64,
    samples_per_cluster: int = 4,
    pooling: str = "mean",
    clustering: str = "kmeans",
    representatives: str = "nearest",
    kmeans_iterations: int = 50,
    cluster_seed: int = 0,
) -> Selector:
    """Takes whole clusters of candidates, in order of the influence of their representatives.

    The candidates are clustered once, before the first step, by their pooled last hidden states into about
    N/cluster_size clusters. At each update `samples_per_cluster` candidates represent their cluster: the mean of their
    projected gradients is scored as one candidate of `less` is. Clusters are taken from the
    highest score on, the last one as far as needed; inside a cluster, candidates nearer to the centroid come first.

    Candidates whose embedding is not finite belong to no cluster and are never chosen, nor are those of clusters whose
    representatives have no finite gradient. A choice's scores are the clusters'.

    Gradients are projected, as the mean of several has a length that numbers of single ones do not tell: the projection
    "auto" is "sketch" here, and "exact" is refused.

    The state is {"cluster": int32 [N], -1 for none; "distance": float32 [N] from the centroid, NaN for none}.

    Args:
        shared: as of `less`.
        cluster_size: candidates in a cluster on average.
        samples_per_cluster: gradients taken of each cluster.
        pooling: embedding of a candidate: "mean" of the hidden states of its tokens, or the "last" one.
        clustering: "kmeans"; "spherical_kmeans": by the largest cosine; "farthest_first": each candidate with the
            nearest of centers that are farthest from each other; "random_projection_lsh": by the sides of random planes
            through the mean, in fewer clusters where sides are empty; "random_partition": at random.
        representatives: of a cluster those "nearest" to its centroid, "farthest" from it, "random" ones, drawn anew at
            each update, or "mixed": the nearest and the farthest left in turn.
        kmeans_iterations: at most so many moves of the centroids; unused by other clusterings.
        cluster_seed: of what a clustering draws, such as the centroids' starting points.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("cluster_size", cluster_size, 1)
    options.at_least("samples_per_cluster", samples_per_cluster, 1)
    options.between("kmeans_iterations", kmeans_iterations, 1, 10_000)
    options.one_of("pooling", pooling, tuple(_POOLINGS))
    options.one_of("clustering", clustering, CLUSTERINGS)
    options.one_of("representatives", representatives, REPRESENTATIVES)
    if shared.projection == "exact":
        reason = "the mean of a cluster's gradients needs them side by side; needs 'auto' or another projection"
        options.refuse("projection", shared.projection, reason)
    settings = shared.influence().projected()

    def init(signals: Signals) -> dict[str, Array]:
        embeddings = np.asarray(signals.candidates.sweep(Embeddings(_POOLINGS[pooling])), np.float32)
        finite = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
        if not len(finite):
            raise InputError("selector 'cluster_less': no candidate has a finite embedding to cluster by")
        num_clusters = max(1, round(len(finite) / cluster_size))
        key = jax.random.key(cluster_seed)
        points = jnp.asarray(embeddings[finite])
        members, distances = clustered(clustering, points, num_clusters, key, kmeans_iterations)
        cluster = jnp.full((len(embeddings),), -1, jnp.int32).at[finite].set(members)
        distance = jnp.full((len(embeddings),), jnp.nan, jnp.float32).at[finite].set(distances)
        return {"cluster": cluster, "distance": distance}

    def score(state: dict[str, Array], signals: Signals, request: Request) -> tuple[Evidence, dict[str, Array]]:
        cluster = np.asarray(state["cluster"])
        place = places(representatives, cluster, np.asarray(state["distance"]), request.key)
        clusters, chosen = first_members(cluster, place, samples_per_cluster)
        influences = sum(
            np.float32(weight) * cluster_influences(settings, checkpoint, chosen)
            for weight, checkpoint in signals.checkpoints
        )
        by_cluster = np.full(max(clusters.max() + 1, 1), np.nan, np.float32)
        by_cluster[clusters] = aggregate(influences, shared.group_agg)
        scores = np.where(cluster >= 0, by_cluster[cluster], np.float32(np.nan))
        return Evidence(Clustered(jnp.asarray(scores), state["cluster"], state["distance"])), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        rows: Clustered = evidence.rows
        ids = jnp.lexsort((rows.distance, rows.cluster, -rows.score))[:num]
        return Choice(ids=ids, scores=rows.score[ids], all_scores=rows.score)

    return Selector(score=score, choose=choose, init=init, needs=shared.needs() | {EXAMPLES})


def places(
    representatives: str, cluster: Int[np.ndarray, " N"], distance: Float[np.ndarray, " N"], key: PRNGKeyArray
) -> np.ndarray:
    """A number for each candidate; those of a cluster with the lowest ones represent it.

    Args:
        representatives: one of `REPRESENTATIVES`.
        cluster: of each candidate; -1 for none.
        distance: from its centroid.
        key: of "random".
    """
    match representatives:
        case "farthest":
            return -distance
        case "random":
            return np.asarray(jax.random.permutation(key, len(cluster)))
        case "mixed":
            order = np.lexsort((distance, cluster))
            _, cluster_of, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
            outwards = np.empty(len(cluster), np.int64)
            outwards[order] = np.arange(len(cluster)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            inwards = sizes[cluster_of] - 1 - outwards
            return np.minimum(2 * outwards, 2 * inwards + 1)
        case _:
            return distance


def first_members(
    cluster: Int[np.ndarray, " N"], place: np.ndarray, samples: int
) -> tuple[Int[np.ndarray, " C"], list[Int[np.ndarray, " s"]]]:
    """The clusters that have members, ascending, and of each the `samples` or fewer first by `place`."""
    order = np.lexsort((place, cluster))
    order = order[np.searchsorted(cluster[order], 0) :]
    clusters, starts = np.unique(cluster[order], return_index=True)
    return clusters, [members[:samples] for members in np.split(order, starts[1:])]


def cluster_influences(
    influence: Influence, signals: Signals, representatives: list[Int[np.ndarray, " s"]]
) -> Float[np.ndarray, "C G"]:
    """The influence on each target group of the mean projected gradient of each cluster's representatives.

    Representatives with a non-finite gradient are left out; NaN where none is left, or their mean is zero.
    """
    targets = directions(influence, signals)
    largest = max(len(members) for members in representatives)
    at_a_time = max(1, _ROWS_AT_A_TIME // largest)
    rows = []
    for start in range(0, len(representatives), at_a_time):
        chunk = representatives[start : start + at_a_time]
        gradients = signals.candidates.sweep(influence.of_candidates(), ids=np.concatenate(chunk))
        means = _finite_means(np.asarray(gradients, np.float32), [len(members) for members in chunk])
        rows.append(np.asarray(_cosines(means, targets)))
    return np.concatenate(rows)


def _finite_means(rows: Float[np.ndarray, "n P"], sizes: list[int]) -> Float[np.ndarray, "C P"]:
    """The mean of the finite rows of each run of consecutive rows; NaN where there is none."""
    finite = np.isfinite(rows).all(axis=1, keepdims=True)
    starts = np.cumsum([0, *sizes[:-1]])
    counts = np.add.reduceat(finite.astype(np.float32), starts)
    sums = np.add.reduceat(np.where(finite, rows, 0), starts)
    return sums / np.where(counts > 0, counts, np.nan)
