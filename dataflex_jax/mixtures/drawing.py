"""The mixtures of a swarm.

Liu et al. 2024, "RegMix", arXiv 2407.01492: Dirichlet distributions around the natural proportions, from almost one
domain alone to almost natural.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

STRENGTHS = (0.1, 5.0)  # of the Dirichlet distributions, log-uniform
LEAST = 0.002  # a smaller weight is none
NATURAL = "natural"


class Mixture(NamedTuple):
    """Weights of the domains.

    Attributes:
        name: for people and tables.
        weights: float64 [K], a distribution.
    """

    name: str
    weights: Float64[np.ndarray, " K"]


def drawn(natural: Float64[np.ndarray, " K"], count: int, seed: int) -> list[Mixture]:
    """Random mixtures, Dirichlet(strength * natural); the first ones are the same for every `count`."""
    return [Mixture(f"mixture {number + 1}", _drawn(natural, seed, number)) for number in range(count)]


def deletions(names: Sequence[str], natural: Float64[np.ndarray, " K"]) -> list[Mixture]:
    """The natural mixture without one domain, for each that it has."""
    kept = [(name, np.where(np.arange(len(names)) == place, 0.0, natural)) for place, name in enumerate(names)]
    return [
        Mixture(f"without {name}", w / w.sum()) for (name, w), there in zip(kept, natural > 0, strict=True) if there
    ]


def _drawn(natural: Float64[np.ndarray, " K"], seed: int, number: int) -> Float64[np.ndarray, " K"]:
    random = np.random.Generator(np.random.Philox(key=[seed, number]))
    strength = np.exp(random.uniform(*np.log(STRENGTHS)))
    there = natural > 0
    weights = np.zeros(len(natural))
    weights[there] = random.dirichlet(strength * natural[there])
    weights[weights < LEAST] = 0.0
    return weights / weights.sum()
