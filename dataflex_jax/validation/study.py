"""Models on random subsets of the candidates, and how well scores foretell their losses."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from ml_collections import ConfigDict

from dataflex_jax.data.targets import TargetSet, open_targets
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.models import Shared, opened, train_and_measure
from dataflex_jax.validation import lds
from dataflex_jax.validation.lds import Interval, Lds
from dataflex_jax.validation.scores import Candidates, read_scores

logger = logging.getLogger(__name__)


class Design(NamedTuple):
    """What is trained.

    Attributes:
        subsets: M, how many.
        alpha: the share of the candidates in each.
        seeds: models on each, whose losses are averaged.
        at_once: models that are trained as one program; None: as many as fit.
    """

    subsets: int
    alpha: float
    seeds: int = 1
    at_once: int | None = None


class Found(NamedTuple):
    """How good the scores are.

    Attributes:
        groups: names of the target groups.
        num_rows: N, the candidates.
        members: the rows of each subset.
        losses: the token-mean loss on each group of the models of a subset, averaged over its seeds.
        foretold: of each file, the sums of its scores.
        lds: of each file.
        by_chance: the mean of what random scores come to, and where the middle of them is.
    """

    groups: tuple[str, ...]
    num_rows: int
    members: Int64[np.ndarray, "M n"]
    losses: Float64[np.ndarray, "M G"]
    foretold: Mapping[str, Float64[np.ndarray, "M G"]]
    lds: Mapping[str, Lds]
    by_chance: Interval


def validate(config: ConfigDict, files: Sequence[Path], design: Design, folder: Path) -> Found | None:
    """Trains the models that the folder does not have yet, and compares their losses with sums of scores.

    The models train as the configuration says, without its selector and order, which choose rows themselves; without a
    mixer or proportions each draws from its subset as a whole.

    Args:
        config: of the models, the candidates and the target set.
        files: of scores.
        design: what is trained.
        folder: keeps the models' losses, and while they are trained their checkpoints.

    Returns:
        What was found; None where a request to stop came first: what was trained is saved.

    Raises:
        InputError: a configuration, data or scores that cannot be used; a folder of other models.
        TrainingError: a model that cannot go on, or models that all have the same loss.
    """
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.selector = config.order = None
    if config.data.packing:
        raise InputError("scores are of single examples; set it to False", option="data.packing", value=True)
    whole_pool = config.mixer is None and config.data.proportions is None
    with opened(config, folder, whole_pool=whole_pool) as shared:
        inputs = shared.experiment.inputs
        targets = open_targets(shared.experiment.config, inputs.domains, inputs.tokenizer_source)
        candidates = Candidates(inputs.pool.num_rows, targets.names)
        scores = {name: read_scores(path, candidates) for name, path in named(files).items()}
        members = _subsets(config, candidates.num_rows, design)
        losses = _losses(shared, members, targets, design)
    if losses is None:
        return None
    return _compared(config.seed, candidates, scores, members, losses)


def named(files: Sequence[Path]) -> dict[str, Path]:
    """The files by what people call them: their names without ending, or whole where two have the same."""
    stems = [path.stem for path in files]
    if twice := sorted({str(path) for path in files if files.count(path) > 1}):
        raise InputError("is given twice", option="--scores", value=twice[0])
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in files}


def _subsets(config: ConfigDict, num_rows: int, design: Design) -> Int64[np.ndarray, "M n"]:
    size = round(design.alpha * num_rows)
    if not 0 < size < num_rows:
        reason = f"makes subsets of {size} of the {num_rows} candidates; some, and not all, are needed"
        raise InputError(reason, option="--alpha", value=design.alpha)
    seen = config.train_step * config.data.batch_size
    logger.info(
        "%d models, each on %d of %d candidates for %.3g epochs (config.train_step = %d).",
        design.subsets * design.seeds,
        size,
        num_rows,
        seen / size,
        config.train_step,
    )
    return lds.subsets(num_rows, design.subsets, design.alpha, config.seed)


def _losses(
    shared: Shared, subsets: Int64[np.ndarray, "M n"], targets: TargetSet, design: Design
) -> Float64[np.ndarray, "M G"] | None:
    seed = shared.experiment.config.seed
    models = [
        Member(f"subset {number + 1}, seed {seed + more}", seed + more, rows=ids)
        for number, ids in enumerate(subsets)
        for more in range(design.seeds)
    ]
    losses = train_and_measure(shared, models, [targets], at_once=design.at_once)
    if losses is None:
        return None
    losses = losses.reshape(design.subsets, design.seeds, -1).mean(axis=1)
    for group, of_group in zip(targets.names, losses.T, strict=True):
        if not np.isfinite(of_group).all() or np.ptp(of_group) == 0:
            what = "the same" if np.isfinite(of_group).all() else "not all finite"
            raise TrainingError(f"target group {group!r}: the losses of all models are {what}; nothing can be ranked")
    return losses


def _compared(
    seed: int,
    candidates: Candidates,
    scores: Mapping[str, Float64[np.ndarray, "N G"]],
    members: Int64[np.ndarray, "M n"],
    losses: Float64[np.ndarray, "M G"],
) -> Found:
    by_chance = lds.random_lds(losses, members, candidates.num_rows, seed)
    return Found(
        groups=candidates.groups,
        num_rows=candidates.num_rows,
        members=members,
        losses=losses,
        foretold={name: lds.foretold(values, members) for name, values in scores.items()},
        lds={name: lds.lds(values, losses, members, by_chance, seed) for name, values in scores.items()},
        by_chance=lds.middle(by_chance),
    )
