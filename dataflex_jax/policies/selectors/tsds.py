"""Candidates drawn so that they are distributed as the targets are, by optimal transport (TSDS)."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.policies import Choice, Evidence, Request, Selector, Signals, options, register_selector
from dataflex_jax.policies.common import ranking
from dataflex_jax.policies.common.embedded import EmbeddingOptions, embedded, needs, saying
from dataflex_jax.policies.common.neighbours import kernel_densities, nearest, usable

# Neighbours are looked for among many more candidates than are taken.
_LARGEST_PART = 10
# So many neighbours of each target are looked at first.
_NEIGHBOURS = 64


class Transported(NamedTuple):
    """What the choice depends on, of each candidate.

    Attributes:
        probability: float32 [n], of a draw; 0 where no target's mass comes here.
        distance: float32 [n], from the nearest target; NaN where it has no embedding.
    """

    probability: Float[Array, " n"]
    distance: Float[Array, " n"]


class Plan(NamedTuple):
    """The optimal transport of the targets' mass to their neighbours.

    Attributes:
        mass: float64, from each target to its first w neighbours, the others have none; 1/M in all from each target.
        cap: the largest product of a density and a mass.
        bound: whether it would be lower if there were more neighbours.
    """

    mass: Float[np.ndarray, "M w"]
    cap: float
    bound: bool


@register_selector("tsds")
@options.including(EmbeddingOptions)
def tsds(
    shared: EmbeddingOptions,
    *,
    alpha: float = 0.6,
    C: float = 5.0,
    sigma: float = 0.75,
    max_k: int = 5000,
    kde_k: int = 1000,
    replacement: bool = False,
) -> Selector:
    """Draws candidates by the mass that an optimal transport of the targets gives them (arXiv 2410.11303).

    Between near neighbours of the targets and diversity: with d the L2 distances of embeddings of length 1 and rho the
    density of candidates around a candidate, the mass gamma_jk from target j of M to its k-th neighbour minimises
    `(alpha / C) sum gamma_jk d_jk + (1 - alpha) M t` where `sum_k gamma_jk = 1/M` and `0 <= rho_k gamma_jk <= t`. A
    candidate is drawn with probability `p_k = sum_j gamma_jk`; near-duplicates share what one of them would have.

    Without replacement, candidates with p = 0 follow where all others are taken, by their distance from the nearest
    target. Candidates whose embedding is zero or not finite are never chosen, and such targets have no mass. A choice's
    scores are p.

    Args:
        shared: whose embeddings; see `EmbeddingOptions`. By default the mean of the current model's hidden states.
        alpha: in [0, 1]; 1: the nearest neighbour of each target alone, 0: as even as `max_k` allows.
        C: scale of distances, > 0.
        sigma: width of the density's kernel `max(0, 1 - d^2 / sigma^2)`, >= 0; 0: all densities are 1.
        max_k: neighbours of each target; at most a tenth of the candidates.
        kde_k: candidates that a density is summed over, of those that are a target's neighbours; at most a tenth of the
            candidates.
        replacement: whether a candidate may be drawn several times.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.between("alpha", alpha, 0, 1)
    options.between("C", C, 0, math.inf, open_low=True, open_high=True)
    options.at_least("sigma", sigma, 0)
    options.at_least("max_k", max_k, 1)
    options.at_least("kde_k", kde_k, 1)
    signal, say = shared.signal("mean"), saying("tsds")

    def at_most(name: str, value: int, available: int) -> int:
        most = max(1, available // _LARGEST_PART)
        if value > most:
            say(f"{name} = {value} is more than a tenth of the {available} candidates with an embedding; it is {most}.")
        return min(value, most)

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        targets, candidates = embedded("tsds", signal, signals)
        available = int(usable(candidates).sum())
        found = nearest(targets, candidates, at_most("max_k", max_k, available))
        ids, places = np.unique(found.ids, return_inverse=True)
        densities = kernel_densities(candidates[ids], at_most("kde_k", kde_k, available), sigma)
        plan = transport(found.distances, densities[places].reshape(found.ids.shape), alpha, C)
        if plan.bound and found.ids.shape[1] < available:
            say("max_k binds: the mass of a target would be spread over more neighbours than it has.")
        ids = found.ids[:, : plan.mass.shape[1]]
        p = np.bincount(ids.ravel(), plan.mass.ravel(), minlength=len(candidates))
        return Evidence(Transported(p.astype(np.float32), found.closest)), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        rows: Transported = evidence.rows
        return ranking.sample(rows.probability, request.key, num, then=rows.distance, replacement=replacement)

    return Selector(score=score, choose=choose, replacement=replacement, needs=needs(signal))


def transport(distances: Float[np.ndarray, "M k"], densities: Float[np.ndarray, "M k"], alpha: float, C: float) -> Plan:
    """The optimum that `tsds` states, of neighbours in ascending order of distance; in float64.

    For a given t each target fills its neighbours, the nearest first, up to t / rho until its 1/M is used up. The
    objective is then convex and piecewise linear in t: where t falls below `1 / (M sum_{l <= m} 1 / rho_l)`, a target
    needs its (m+1)-th neighbour too, and the slope falls by `(alpha / C) (d_{m+1} - d_m) sum_{l <= m} 1 / rho_l`. The
    optimum is where it reaches 0. Few neighbours of a target are as a rule enough to find it: more are looked at until
    no corner of those left out can be above it. Below the least t at which every target's neighbours hold its mass
    there is no plan.
    """
    (num, k), share = distances.shape, 1 / len(distances)
    limit, reached = (1 - alpha) * num, False
    width, room = 0, np.zeros((num, 1))
    rooms, corners, falls = [], [], []
    while width < k and not reached:
        start, width = width, min(max(2 * width, _NEIGHBOURS), k)
        room = room[:, -1:] + np.cumsum(1 / np.asarray(densities[:, start:width], np.float64), axis=1)
        near = np.asarray(distances[:, start : width + 1], np.float64)
        further = np.diff(near, axis=1, append=near[:, -1:])[:, : width - start]
        rooms.append(room)
        corners.append(share / room)
        falls.append((alpha / C) * room * further)
        # Of the corners from here on none is left out.
        least = corners[-1][:, -1].max()
        known = [part >= least for part in corners]
        reached = sum(part[which].sum() for part, which in zip(falls, known, strict=True)) >= limit
    cap = float(least)
    if reached:
        of_known = (
            np.concatenate([part[which] for part, which in zip(parts, known, strict=True)])
            for parts in (corners, falls)
        )
        cap = _reaching(limit, *of_known)
    mass = np.diff(np.minimum(cap * np.concatenate(rooms, axis=1), share), axis=1, prepend=0)
    return Plan(mass, cap, not reached and alpha < 1)


def _reaching(limit: float, corners: Float[np.ndarray, " n"], falls: Float[np.ndarray, " n"]) -> float:
    """The highest corner such that its fall and those of all corners above it sum to `limit`, which all together do.

    In time n: half of what is left is put aside again and again.
    """
    pivot = 0.0
    while len(corners):
        middle = len(corners) // 2
        pivot = np.partition(corners, middle)[middle]
        above = corners > pivot
        before = falls[above].sum()
        if above.any() and before >= limit:
            corners, falls = corners[above], falls[above]
            continue
        below = corners < pivot
        here = before + falls[corners == pivot].sum()
        if here >= limit:
            break
        limit, corners, falls = limit - here, corners[below], falls[below]
    return float(pivot)
