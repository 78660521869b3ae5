"""Swarms: small models, each on a mixture of its own, trained as one program and measured."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from ml_collections import ConfigDict

from dataflex_jax.data.targets import TargetSet, held_out, open_targets
from dataflex_jax.errors import InputError
from dataflex_jax.mapped.measuring import bytes_per_token
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.models import Shared, opened, train_and_measure
from dataflex_jax.mapped.states import starting_mixer
from dataflex_jax.mixtures import drawing, tables
from dataflex_jax.mixtures.drawing import Mixture
from dataflex_jax.policies.proportions import starting_proportions

_TARGET = "target/"
_NEAR = 1e-3  # of weights that are the same


class Design(NamedTuple):
    """What is trained.

    Attributes:
        runs: random mixtures.
        seeds: models of each mixture.
        natural: whether the natural mixture is one of the runs.
        deletions: whether the natural mixture without a domain is one, for each domain.
        at_once: models that are trained as one program; None: as many as fit.
    """

    runs: int
    seeds: int = 1
    natural: bool = False
    deletions: bool = False
    at_once: int | None = None


class Swarm(NamedTuple):
    """What the models of a swarm have in common.

    Attributes:
        shared: configuration, data and folder.
        domains: names of the K domains.
        natural: `config.data.proportions`, by default each domain's share of the rows.
        tokens: that each domain has.
        measured: the held-out rows by domain, and the target groups where the configuration names some.
    """

    shared: Shared
    domains: tuple[str, ...]
    natural: Float64[np.ndarray, " K"]
    tokens: Float64[np.ndarray, " K"]
    measured: tuple[TargetSet, ...]


@contextlib.contextmanager
def opened_swarm(config: ConfigDict, folder: Path) -> Iterator[Swarm]:
    """The data and the model of a swarm, with the mesh set.

    Args:
        config: of each model. A mixer begins with each one's mixture.
        folder: for what is kept of them.

    Raises:
        InputError: a configuration or an input that cannot be run, in one line.
    """
    with opened(config, folder) as shared:
        inputs = shared.experiment.inputs
        names = tuple(domain.name for domain in inputs.domains)
        if len(names) < 2:
            raise InputError("a mixture has two domains or more", option="data.domains", value=names)
        measured = [held_out(inputs.domains, config.eval_rows)]
        if config.targets.source is not None:
            measured.append(open_targets(shared.experiment.config, inputs.domains, inputs.tokenizer_source))
        proportions = shared.experiment.config.data.proportions  # numbers, whatever form they had
        natural = np.asarray(starting_proportions("proportions", proportions, inputs.pool.natural), np.float64)
        if (natural > 0).sum() < 2:
            reason = "a mixture has two domains or more above 0"
            raise InputError(reason, option="data.proportions", value=proportions)
        tokens = np.array([float(domain.train.lengths().sum()) for domain in inputs.domains])
        yield Swarm(shared, names, natural / natural.sum(), tokens, tuple(measured))


def train(swarm: Swarm, design: Design) -> bool:
    """Trains the models that the folder does not have yet, and writes `ratios.csv` and `metrics.csv`.

    Returns:
        Whether they are done; False where a request to stop came first: what was trained is saved.

    Raises:
        InputError: a folder of other models.
        TrainingError: a model that cannot go on.
    """
    seed = swarm.shared.experiment.config.seed
    mixtures = drawing.drawn(swarm.natural, design.runs, seed)
    if design.natural:
        mixtures.append(Mixture(drawing.NATURAL, swarm.natural))
    if design.deletions:
        mixtures += drawing.deletions(swarm.domains, swarm.natural)
    seeds = range(seed, seed + design.seeds)
    found = measured_models(swarm, mixtures, seeds, design.at_once)
    if found is None:
        return False
    folder = swarm.shared.folder
    lines = [[mixture.name, *mixture.weights.tolist()] for mixture in mixtures]
    tables.write(folder / tables.RATIOS, [tables.RUN, *swarm.domains], lines)
    tables.write_metrics(folder, [mixture.name for mixture in mixtures], seeds, metric_names(swarm), found)
    return True


def measured_models(
    swarm: Swarm, mixtures: Sequence[Mixture], seeds: Sequence[int], at_once: int | None
) -> Float64[np.ndarray, "S n M"] | None:
    """The metrics, as in `metric_names`, of models of each mixture and seed; None: asked to stop, saved.

    Raises:
        InputError: a folder of other models.
        TrainingError: a model that cannot go on.
    """
    members = [
        Member(f"{mixture.name}, seed {seed}", seed, proportions=mixture.weights)
        for mixture in mixtures
        for seed in seeds
    ]
    _check_mixer(swarm, members[0])
    losses = train_and_measure(swarm.shared, members, swarm.measured, at_once=at_once)
    return None if losses is None else figures(swarm, losses).reshape(len(mixtures), len(seeds), -1)


def figures(swarm: Swarm, losses: Float64[np.ndarray, "n G"]) -> Float64[np.ndarray, "n M"]:
    """The metrics, as in `metric_names`, of models with these losses on all groups."""
    per_token = np.concatenate([bytes_per_token(each) for each in swarm.measured])
    return np.concatenate([losses, losses / np.log(2) / per_token], axis=1)


def metric_names(swarm: Swarm) -> list[str]:
    """nll [nats a token] and bits_per_byte of each domain, and, as target/GROUP, of each target group."""
    held_out_rows, *targets = swarm.measured
    groups = [*held_out_rows.names, *(_TARGET + name for each in targets for name in each.names)]
    return [f"{metric}/{group}" for metric in ("nll", "bits_per_byte") for group in groups]


def _check_mixer(swarm: Swarm, member: Member) -> None:
    """Refuses a mixer that draws from other proportions than a model's own at the start."""
    experiment = swarm.shared.experiment
    weights = experiment.policies.mixer.policy.sampling_weights(starting_mixer(experiment, member))
    if np.abs(np.asarray(weights, np.float64) - member.proportions).max() > _NEAR:
        shares = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(swarm.domains, weights, strict=True))
        reason = (
            f"begins with {shares} whatever the mixture; let it begin with the run's proportions (None, or natural)"
        )
        raise InputError(reason, option="mixer", value=experiment.policies.mixer.name)
