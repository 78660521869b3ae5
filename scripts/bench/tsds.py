"""The solution of TSDS's optimal transport beside the authors' and the peer's, which goes through a heap; in turns.

    python scripts/bench/tsds.py [--candidates=100000] [--targets=1000] [--max_k=5000] [--kde_k=1000] [--width=128] \\
        [--rounds=5]

Neighbours and densities are found once, of random embeddings in groups, and given to both; what is measured is the way
from there to the probability of each candidate. The heap's side is the algorithm of arXiv 2410.11303 as its authors and
DataFlex have it, in plain Python on NumPy arrays.
"""

import heapq
import time

import numpy as np
import results
from absl import flags

ALPHA, C, SIGMA = 0.6, 5.0, 0.75


def by_heap(distances: np.ndarray, densities: np.ndarray, ids: np.ndarray, num: int) -> np.ndarray:
    """The probabilities [num], target by target through a heap of the next one that needs another neighbour."""
    targets, k = distances.shape
    used, costs, total, room = [0] * targets, np.zeros(targets), 0.0, 0.0
    heap = [(1.0 / densities[j][0], 0, j) for j in range(targets)]
    heapq.heapify(heap)
    weighted = [distances[j][0] / densities[j][0] for j in range(targets)]
    while heap:
        room, place, j = heapq.heappop(heap)
        total -= costs[j]
        costs[j] = distances[j][place + 1] * room - weighted[j]
        total += costs[j]
        if ALPHA / C * total >= (1 - ALPHA) * targets:
            break
        used[j] = place
        if place < k - 2:
            heapq.heappush(heap, (room + 1.0 / densities[j][place + 1], place + 1, j))
            weighted[j] += distances[j][place + 1] / densities[j][place + 1]
    probabilities = np.zeros(num)
    for j in range(targets):
        given = 0.0
        for place in range(used[j] + 1):
            mass = 1 / (targets * room * densities[j][place])
            probabilities[ids[j][place]] += mass
            given += mass
        probabilities[ids[j][used[j] + 1]] += max(1 / targets - given, 0)
    return probabilities


def by_search(distances: np.ndarray, densities: np.ndarray, ids: np.ndarray, num: int) -> np.ndarray:
    """The probabilities [num], as the selector has them."""
    from dataflex_jax.policies.selectors.tsds import transport

    mass = transport(distances, densities, ALPHA, C).mass
    return np.bincount(ids[:, : mass.shape[1]].ravel(), mass.ravel(), minlength=num)


def grouped_rows(rng: np.random.Generator, centers: np.ndarray, rows: int) -> np.ndarray:
    """Directions around centers of which each has some, float32."""
    found = centers[rng.integers(0, len(centers), rows)] + 0.7 * rng.standard_normal((rows, centers.shape[1]))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances, densities and ids of the targets' neighbours, each [M, k]."""
    from dataflex_jax.policies.common.neighbours import kernel_densities, nearest

    options, rng = flags.FLAGS, np.random.default_rng(0)
    centers = rng.standard_normal((max(2, options.candidates // 500), options.width))
    candidates, targets = (grouped_rows(rng, centers, rows) for rows in (options.candidates, options.targets))
    found = nearest(targets, candidates, min(options.max_k, max(1, options.candidates // 10)))
    ids, places = np.unique(found.ids, return_inverse=True)
    densities = kernel_densities(candidates[ids], min(options.kde_k, max(1, options.candidates // 10)), SIGMA)
    return found.distances, densities[places].reshape(found.ids.shape), found.ids


def main(argv: list[str]) -> None:
    from dataflex_jax import cli
    from dataflex_jax.configs import base
    from dataflex_jax.training import run_config

    cli.no_positional(argv)
    distances, densities, ids = problem()
    sides = {"ours": by_search, "heap": by_heap}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for i in range(flags.FLAGS.rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            found[name] = sides[name](distances, densities, ids, flags.FLAGS.candidates)
            seconds[name].append(time.perf_counter() - start)
    result = {
        **results.describe(run_config.resolved(base.get_config())),
        **{name: getattr(flags.FLAGS, name) for name in ("candidates", "targets", "kde_k", "width", "rounds")},
        "max_k": distances.shape[1],
        "seconds": {name: results.spread(values) for name, values in seconds.items()},
        "heap_over_ours": results.spread(np.divide(seconds["heap"], seconds["ours"])),
        # Total variation: the heap's last neighbours have what the cap leaves.
        "difference": float(np.abs(found["ours"] - found["heap"]).sum() / 2),
    }
    results.write(flags.FLAGS.output, result)
    medians = {name: f"{s['median']:.4f} s" for name, s in result["seconds"].items()}
    print(f"{medians}, {result['heap_over_ours']['median']:.1f} x; difference {result['difference']:.2e}")


if __name__ == "__main__":
    from dataflex_jax import cli

    flags.DEFINE_integer("candidates", 100000, "N.", lower_bound=20)
    flags.DEFINE_integer("targets", 1000, "M.", lower_bound=1)
    flags.DEFINE_integer("max_k", 5000, "Neighbours of each target; at most N / 10.", lower_bound=2)
    flags.DEFINE_integer("kde_k", 1000, "Candidates that a density is summed over; at most N / 10.", lower_bound=1)
    flags.DEFINE_integer("width", 128, "Numbers an embedding.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Rounds; each has one solution of each side.", lower_bound=1)
    cli.define_path("output", f"{results.FOLDER}/tsds.json", "The result.")
    cli.run(main)
