"""The nearest neighbours of the targets, by embeddings."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dataflex_jax.policies import Choice, Evidence, Request, Selector, Signals, options, register_selector
from dataflex_jax.policies.common.embedded import EmbeddingOptions, embedded, needs, saying
from dataflex_jax.policies.common.neighbours import Neighbours, nearest, usable


class Ranked(NamedTuple):
    """What the choice depends on, of each candidate.

    Attributes:
        rank: int32 [n], the least of its places among the neighbours of a target, 0 for a nearest one.
        distance: float32 [n], the least from a target of which it has that rank; NaN where it has no embedding.
    """

    rank: Int[Array, " n"]
    distance: Float[Array, " n"]


@register_selector("near")
@options.including(EmbeddingOptions)
def near(shared: EmbeddingOptions, *, max_k: int = 1000) -> Selector:
    """Takes the nearest neighbour of every target, then every second one, and so on, until there are enough.

    Neighbours are exact, by the L2 distance of embeddings of length 1: pooled last hidden states of the current model,
    by default their mean, or what other source of embeddings `shared` names.
    A candidate comes once, at its best rank; of equal ranks the nearer comes first. Candidates that are not among the
    `max_k` nearest of any target follow after all others, by their distance from the nearest target. Ranks are of the
    whole pool, also where a mixer draws by domain.

    Candidates whose embedding is zero or not finite are never chosen, and such targets have no neighbours. A choice's
    scores are -(rank + distance / 4).

    Args:
        shared: whose embeddings; see `EmbeddingOptions`.
        max_k: neighbours of each target that are ranked; at most all candidates.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.at_least("max_k", max_k, 1)
    signal, say = shared.signal("mean"), saying("near")

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        targets, candidates = embedded("near", signal, signals)
        available = int(usable(candidates).sum())
        if max_k > available:
            say(f"max_k = {max_k} is more than the {available} candidates with an embedding; all of them are ranked.")
        return Evidence(ranked(nearest(targets, candidates, max_k))), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        rows: Ranked = evidence.rows
        ids = jnp.lexsort((rows.distance, rows.rank))[:num]
        scores = -(rows.rank + rows.distance / 4)
        return Choice(ids=ids, scores=scores[ids], all_scores=scores)

    return Selector(score=score, choose=choose, needs=needs(signal))


def ranked(found: Neighbours) -> Ranked:
    """Each candidate's best rank and its distance there; k, and the least distance, where it is nobody's neighbour."""
    k = found.ids.shape[1]
    ranks, distances = np.broadcast_to(np.arange(k, dtype=np.int32), found.ids.shape).ravel(), found.distances.ravel()
    best_first = np.lexsort((distances, ranks))
    ids, first = np.unique(found.ids.ravel()[best_first], return_index=True)
    best = best_first[first]
    rank, distance = np.full(len(found.closest), k, np.int32), found.closest.copy()
    rank[ids], distance[ids] = ranks[best], distances[best]
    return Ranked(rank, distance)
