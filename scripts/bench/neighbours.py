"""Exact nearest neighbours of random embeddings beside faiss-cpu's exact search and NumPy's brute force, in turns.

    python scripts/bench/neighbours.py [--candidates=10000,100000] [--targets=100,1000] [--k=1000] [--width=512] \\
        [--faiss=FOLDER] [--rounds=5]

All three have the same arrays, find the same neighbours and sort them, in one process with as many threads as it may
use cores. faiss (IndexFlatL2, its index made anew in each round) is measured where it can be imported; --faiss names a
folder to import it from (pip install --target=FOLDER --no-deps faiss-cpu). NumPy's side is a matrix product and
argpartition, some targets at a time.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import results
from absl import flags

_ROWS = 64  # of NumPy's distances at a time

Search = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def numpy_search(targets: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """Ids [M, k], the nearest first."""
    norms, found = np.einsum("nd,nd->n", candidates, candidates), []
    for start in range(0, len(targets), _ROWS):
        squares = norms - 2 * targets[start : start + _ROWS] @ candidates.T
        ids = np.argpartition(squares, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(squares, ids, axis=1), axis=1)
        found.append(np.take_along_axis(ids, order, axis=1))
    return np.concatenate(found)


def searches(folder: str | None) -> dict[str, Search]:
    """What is compared, by name."""
    from dataflex_jax.policies.common.neighbours import nearest

    sides: dict[str, Search] = {
        "ours": lambda targets, candidates, k: nearest(targets, candidates, k).ids,
        "numpy": numpy_search,
    }
    if folder is not None:
        sys.path.insert(0, folder)
    if importlib.util.find_spec("faiss") is None:
        return sides
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))

    def faiss_search(targets: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
        index = faiss.IndexFlatL2(candidates.shape[1])
        index.add(candidates)
        return index.search(targets, k)[1]

    return sides | {"faiss": faiss_search}


def unit_rows(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Random float32 directions."""
    found = rng.standard_normal((rows, width), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compared(sides: dict[str, Search], targets: np.ndarray, candidates: np.ndarray, k: int) -> dict[str, Any]:
    """One size: seconds of each side, wall time and CPU time, and what share of the neighbours are ours."""
    ids = {name: search(targets, candidates, k) for name, search in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(flags.FLAGS.rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](targets, candidates, k)
            seconds[name].append(time.perf_counter() - wall)
            cpu_seconds[name].append(time.process_time() - cpu)
    others = [name for name in sides if name != "ours"]
    return {
        "candidates": len(candidates),
        "targets": len(targets),
        "k": k,
        "seconds": {name: results.spread(values) for name, values in seconds.items()},
        "cpu_seconds": {name: results.spread(values) for name, values in cpu_seconds.items()},
        "other_over_ours": {name: results.spread(np.divide(seconds[name], seconds["ours"])) for name in others},
        # Rounding decides between neighbours that are equally far.
        "same_neighbours": {
            name: float(np.mean([len(np.intersect1d(*pair)) / k for pair in zip(ids[name], ids["ours"], strict=True)]))
            for name in others
        },
    }


def main(argv: list[str]) -> None:
    from dataflex_jax import cli
    from dataflex_jax.configs import base
    from dataflex_jax.errors import InputError
    from dataflex_jax.training import run_config

    cli.no_positional(argv)
    sizes = {name: getattr(flags.FLAGS, name) for name in ("candidates", "targets", "k")}
    for name, values in sizes.items():
        if not all(value.isdecimal() and int(value) > 0 for value in values):
            raise InputError(f"--{name}={','.join(values)}: must be a list of integers >= 1")
    sides, width, rows = searches(flags.FLAGS.faiss), flags.FLAGS.width, []
    for n in map(int, sizes["candidates"]):
        rng = np.random.default_rng(0)
        candidates = unit_rows(rng, n, width)
        for m in map(int, sizes["targets"]):
            targets = unit_rows(rng, m, width)
            for k in sorted({min(int(k), n) for k in sizes["k"]}):
                rows.append(compared(sides, targets, candidates, k))
                medians = {name: f"{s['median']:.3f} s" for name, s in rows[-1]["seconds"].items()}
                print(f"N {n:,}, M {m:,}, k {k:,}: {medians}")
    described = results.describe(run_config.resolved(base.get_config()))
    versions = {"faiss": sys.modules["faiss"].__version__ if "faiss" in sides else None}
    result = {**described, "peer_versions": versions, "width": width, "rounds": flags.FLAGS.rounds, "sizes": rows}
    results.write(flags.FLAGS.output, result)


if __name__ == "__main__":
    from dataflex_jax import cli

    flags.DEFINE_list("candidates", ["10000", "100000"], "N, a list.")
    flags.DEFINE_list("targets", ["100", "1000"], "M, a list.")
    flags.DEFINE_list("k", ["1000"], "Neighbours of each target, a list; at most N.")
    flags.DEFINE_integer("width", 512, "Numbers an embedding.", lower_bound=1)
    flags.DEFINE_string("faiss", None, "A folder to import faiss from.")
    flags.DEFINE_integer("rounds", 5, "Rounds; each has one search of each side.", lower_bound=1)
    cli.define_path("output", f"{results.FOLDER}/neighbours.json", "The result.")
    cli.run(main)
