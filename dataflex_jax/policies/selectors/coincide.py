"""COINCIDE for text: more from clusters that are like the others and not dense, in each those that stand for it.

Lee et al. 2024, "Concept-skill Transferability-based Data Selection for Large Vision-Language Models", arXiv
2406.10995.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
from dataflex_jax.policies.common import ranking
from dataflex_jax.policies.common.embedded import saying
from dataflex_jax.policies.common.herding import inside_clusters
from dataflex_jax.policies.common.kmeans import spherical_kmeans
from dataflex_jax.policies.common.neighbours import usable
from dataflex_jax.policies.common.pooling import mean, side_by_side

# A weight that leaves room for sizes to be divided by it.
_LEAST = 1e-200


class Clustered(NamedTuple):
    """What the choice depends on, of each candidate.

    Attributes:
        cluster: int32 [n].
        place: float32 [n], in the order of its cluster, from 0; NaN where it has no features.
    """

    cluster: Int[Array, " n"]
    place: Float[Array, " n"]


@register_selector("coincide")
def coincide(
    *, num_clusters: int = 10000, layers: int = 5, tau: float = 1.0, kmeans_iterations: int = 10, cluster_seed: int = 0
) -> Selector:
    """Divides the choice among clusters of candidates, and takes of each the members that stand for it.

    A candidate's features are the means over its tokens of tanh(h) for the hidden states h after some layers of the
    current model, each of length 1, side by side and of length 1 again. Spherical k-means makes clusters of them.
    Cluster i has a share of the choice in proportion to `exp(S_i / (tau D_i))`: its transferability S_i is the mean
    cosine of its centroid with the others, its density D_i the mean of `exp(-|u - v|^2)` over pairs of its members. No
    cluster has a share beyond its size; the others have what is left in the same proportions, and of fractions the
    largest are rounded up. Inside a cluster, members are taken one after the other so that those taken are as like the
    whole cluster as can be, by the maximum mean discrepancy with the kernel `exp(-|u - v|^2)`.

    There is no target set. All features are kept while a choice is made, 4 bytes a number, and a cluster of m members
    takes time m^2. With a mixer, clusters and orders are of the whole pool, shares of a domain's part of it. A choice's
    scores are what part of its cluster's share was left when a candidate was taken, in (0, 1]; those of others are at
    most 0. Candidates whose features are not finite are never chosen.

    Args:
        num_clusters: K; at most all candidates.
        layers: after how many evenly spaced layers the hidden states are taken; all where there are fewer.
        tau: temperature of the shares, > 0.
        kmeans_iterations: at most so many times the centroids move.
        cluster_seed: of the first centroids.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("num_clusters", num_clusters, 1)
    options.at_least("layers", layers, 1)
    options.positive("tau", tau)
    options.at_least("kmeans_iterations", kmeans_iterations, 0)
    options.at_least("cluster_seed", cluster_seed, 0)
    signal = Embeddings(mean_of_tanh, then=side_by_side, layers=layers)
    say = saying("coincide")

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        features = np.asarray(signals.candidates.sweep(signal), np.float32)
        known = usable(features)
        available = int(known.sum())
        if not available:
            raise InputError("selector 'coincide': no candidate has features that are finite and not zero")
        if num_clusters > available:
            say(f"num_clusters = {num_clusters} is more than the {available} candidates with features; it is that.")
        count = min(num_clusters, available)
        points, key = features[known], jax.random.key(cluster_seed)
        cluster, _, centroids = spherical_kmeans(points, count, key, kmeans_iterations, reseed=True)
        inside = inside_clusters(points, np.asarray(cluster), count)
        sizes = np.bincount(cluster, minlength=count)
        exponents = transferability(np.asarray(centroids), sizes) / (tau * inside.density)
        rows = Clustered(np.zeros(len(features), np.int32), np.full(len(features), np.nan, np.float32))
        rows.cluster[known], rows.place[known] = cluster, inside.place
        return Evidence(rows, jnp.asarray(exponents, jnp.float32)), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        rows: Clustered = evidence.rows
        sizes = jnp.bincount(rows.cluster, length=evidence.shared.shape[0])
        budget = shared_out(evidence.shared, sizes, num)[rows.cluster]
        # In a domain, the places of the members that are in it.
        order = jnp.lexsort((rows.place, rows.cluster))
        starts = jnp.cumsum(sizes) - sizes
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]) - starts[rows.cluster[order]])
        return ranking.best((budget - place) / jnp.maximum(budget, 1), num)

    return Selector(score=score, choose=choose, needs=frozenset({EXAMPLES}))


def mean_of_tanh(hidden: Float[Array, "B T D"], mask: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """The mean of tanh of the hidden states of the real tokens, L2-normalised; 0 for a row of padding only."""
    return mean(jnp.tanh(hidden.astype(jnp.float32)), mask)


def transferability(centroids: Float[np.ndarray, "K d"], sizes: Int[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """The mean cosine of each centroid with the others, float64; 0 of an only one, -inf of one without members."""
    centroids = centroids.astype(np.float64)
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    filled = sizes > 0
    others = max(int(filled.sum()) - 1, 1)
    return np.where(filled, (centroids @ centroids[filled].sum(axis=0) - 1) / others, -np.inf)


def shared_out(exponents: Float[Array, " K"], sizes: Int[Array, " K"], num: int) -> Int[Array, " K"]:
    """How many each cluster has of `num`: in proportion to exp(exponent), no more than its size.

    Where clusters are full, the others have what is left in the same proportions. Shares are rounded down, and the
    largest remainders up, of equal ones the first.

    Args:
        exponents: -inf for none, as long as the others hold them all.
        sizes: of the clusters, together at least `num`.
        num: how many in all.
    """
    filled = sizes > 0
    # Clusters fill up in this order as `num` grows.
    order = jnp.argsort(jnp.where(filled, jnp.log(sizes) - exponents, -jnp.inf), stable=True)
    relative = jnp.where(filled, exponents - jnp.max(jnp.where(filled, exponents, -jnp.inf)), 0.0)
    # In float32 the shares of a large choice would not add up to it.
    with jax.enable_x64(True):
        weights = jnp.where(filled, jnp.maximum(jnp.exp(relative.astype(jnp.float64)), _LEAST), 0.0)
        room = sizes.astype(jnp.float64)
        full = jnp.cumsum(room[order]) - room[order]
        left = jnp.cumsum(weights[order][::-1])[::-1]
        # Whichever clusters are thought to be full, the others need at least this level to hold the rest.
        level = jnp.max((num - full) / left)
        shares = jnp.minimum(room, level * weights)
        whole = jnp.floor(shares)
        remainders = jnp.where(whole < room, shares - whole, -1.0).astype(jnp.float32)
        missing = (num - jnp.sum(whole)).astype(jnp.int32)
        whole = whole.astype(jnp.int32)
    places = jnp.argsort(jnp.argsort(-remainders, stable=True), stable=True)
    return whole + (places < missing)
