"""From the runs of a swarm to a proposal, and what models say of it."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from dataflex_jax.mixtures import law, proposal
from dataflex_jax.mixtures.drawing import NATURAL, Mixture
from dataflex_jax.mixtures.law import Checked, Law
from dataflex_jax.mixtures.swarm import Swarm, measured_models, metric_names
from dataflex_jax.mixtures.tables import Runs
from dataflex_jax.reporting.intervals import Difference, difference

logger = logging.getLogger(__name__)

PROPOSAL, UNIFORM = "proposal", "uniform"


class Found(NamedTuple):
    """What a swarm says.

    Attributes:
        runs: of the swarm.
        law: of each metric.
        checked: how well it predicts.
        prior: the mixture that the proposal stays near.
        most: the largest weight of each domain.
        proposal: the mixture.
    """

    runs: Runs
    law: Law
    checked: Checked
    prior: Float64[np.ndarray, " K"]
    most: Float64[np.ndarray, " K"]
    proposal: Float64[np.ndarray, " K"]


class Verified(NamedTuple):
    """What models of the proposal, the natural mixture and uniform weights came to.

    Attributes:
        values: of each mixture, the mean of the metrics of each seed's model.
        against: how much larger the proposal's mean is than that of each other one; below 0 it helped.
    """

    values: Mapping[str, Float64[np.ndarray, " n"]]
    against: Mapping[str, Difference]


def found(runs: Runs, prior: Float64[np.ndarray, " K"], most: Float64[np.ndarray, " K"], seed: int) -> Found:
    """Fits the law, checks it and proposes a mixture; warns where the law says nothing.

    Args:
        runs: of the swarm.
        prior: the mixture that the proposal stays near.
        most: the largest weight of each domain.
        seed: of the folds.

    Raises:
        InputError: a metric that is the same in all runs.
    """
    law.check_values(runs.metrics, runs.values)
    checked = law.cross_validated(runs.weights, runs.values, seed)
    fitted = law.fit(runs.weights, runs.values)
    if not checked.foretells.all():
        names = [name for name, tells in zip(runs.metrics, checked.foretells, strict=True) if not tells]
        logger.warning(
            "The law predicts runs that it has not seen no better than the mean does, of %s: %s. Train more runs or "
            "seeds, or for longer.",
            ", ".join(names),
            "they are left out" if checked.foretells.any() else "nothing is left, and the prior is proposed",
        )
    return Found(runs, fitted, checked, prior, most, proposal.propose(fitted, prior, most, checked.foretells))


def verified(swarm: Swarm, what: Found, seeds: range, at_once: int | None) -> Verified | None:
    """Trains models of the three mixtures; None: asked to stop, saved.

    Args:
        swarm: whose models.
        what: was found.
        seeds: of each mixture's models, others than the swarm's.
        at_once: models that are trained as one program; None: as many as fit.

    Raises:
        TrainingError: a model that cannot go on.
    """
    uniform = (swarm.natural > 0) / (swarm.natural > 0).sum()
    mixtures = [Mixture(PROPOSAL, what.proposal), Mixture(NATURAL, swarm.natural), Mixture(UNIFORM, uniform)]
    measured = measured_models(swarm, mixtures, seeds, at_once)
    if measured is None:
        return None
    names = metric_names(swarm)
    means = measured[..., [names.index(name) for name in what.runs.metrics]].mean(axis=-1)
    by_seed = [dict(zip(seeds, of_mixture.tolist(), strict=True)) for of_mixture in means]
    return Verified(
        {mixture.name: of_mixture for mixture, of_mixture in zip(mixtures, means, strict=True)},
        {mixture.name: difference(by_seed[0], other) for mixture, other in zip(mixtures[1:], by_seed[1:], strict=True)},
    )
