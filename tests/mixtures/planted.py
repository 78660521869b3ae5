"""A swarm whose law and optimum are known."""

import numpy as np

from dataflex_jax.mixtures import drawing
from dataflex_jax.mixtures.law import Law
from dataflex_jax.mixtures.tables import Runs

DOMAINS = ("news", "code", "maths", "talk", "books")
METRICS = ("a", "b", "c")


def prior() -> np.ndarray:
    return np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def law(seed: int = 0) -> Law:
    random = np.random.default_rng(seed)
    slopes = random.normal(-0.5, 0.8, (len(METRICS), len(DOMAINS))) - 2 * np.eye(len(METRICS), len(DOMAINS), 2)
    return Law(random.uniform(1, 3, len(METRICS)), slopes)


def runs(count: int, noise: float, values_of=None, seed: int = 0) -> Runs:
    """Runs of the planted law with noise; `values_of` weights in place of the law's."""
    weights = np.stack([mixture.weights for mixture in drawing.drawn(prior(), count, seed)])
    values = (values_of or law().at)(weights)
    values = values + noise * np.random.default_rng(seed).normal(size=values.shape)
    names = tuple(f"mixture {number}" for number in range(count))
    return Runs(names, DOMAINS, weights, METRICS, values, None)
