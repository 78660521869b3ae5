"""The study's models: what all have in common, and how the models of a row are trained and measured."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import study_data
import study_rows
from jaxtyping import Float64
from ml_collections import ConfigDict
from study_rows import Row, Share

from dataflex_jax.configs import base
from dataflex_jax.data.targets import TargetSet, held_out, open_targets
from dataflex_jax.errors import TrainingError
from dataflex_jax.files import replace_json
from dataflex_jax.foreign import read_json
from dataflex_jax.json_lines import read_jsonl
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.models import Shared, opened, train_and_measure
from dataflex_jax.mixtures import fitting, proposal, swarm, tables
from dataflex_jax.mixtures import results as swarm_results
from dataflex_jax.mixtures.swarm import Design, opened_swarm
from dataflex_jax.training.domain_weights import WEIGHTS_FILE, read_weights
from dataflex_jax.training.setup import train_and_evaluate

_OTHERS = 1000  # the seeds of tuning, of the swarm and of the base are none of the rows'


class Scale(NamedTuple):
    """How large the study is.

    Attributes:
        model: fields of the configuration's model.
        tokenizer: of the pretraining text.
        seq_len: tokens a row.
        cutoff_len: tokens of a question with its answer at most.
        batch_size: rows a step.
        steps: of a pretraining model; an instruction model has `tuning_steps` on top of `base_steps`.
        base_steps: of the model that is tuned on instructions.
        tuning_steps: of a model that is tuned on instructions.
        rates: learning rates that are tried, of each part.
        tried: models of a learning rate.
        swarm: mixtures of the swarm.
        candidates: questions of a domain that there are to choose from, at most.
        measured: rows of a domain that are measured at most.
        looked_at: rows of a domain, or of a target group, that policies look at.
    """

    model: Mapping[str, Any]
    tokenizer: str
    seq_len: int
    cutoff_len: int
    batch_size: int
    steps: int
    base_steps: int
    tuning_steps: int
    rates: Mapping[str, Sequence[float]]
    tried: int
    swarm: int
    candidates: int
    measured: int
    looked_at: int


class Losses(NamedTuple):
    """Of a row's models, in nats a token.

    Attributes:
        groups: names of the G domains.
        values: of the n seeds in order.
        trained: how many models were trained for them, with references, proxies and swarms.
        cpu_seconds: of all cores, for all of them; None: the row was interrupted.
    """

    groups: tuple[str, ...]
    values: Float64[np.ndarray, "n G"]
    trained: int
    cpu_seconds: float | None


class Part:
    """One of the two tables: the data, the configuration of a row, and its models.

    Args:
        name: "pretraining" or "instruction".
        source: folder of the data.
        folder: keeps the data's parts and all models.
        scale: of the study.
        seeds: of each row's models.
    """

    def __init__(self, name: str, source: Path, folder: Path, scale: Scale, seeds: Sequence[int]):
        self.name, self._folder, self._scale, self._seeds = name, folder / name, scale, tuple(seeds)
        self._root, self._cache = folder / "data" / name, folder / "cache"
        if not (self._root / "done").exists():
            make = {"pretraining": study_data.pretraining, "instruction": study_data.instruction}[name]
            make(source, self._root)
            (self._root / "done").touch()
        self.base: Path | None = None

    def config(self, row: Row, learning_rate: float, steps: int | None = None) -> ConfigDict:
        """Of a row's models; the seed is to be set.

        Args:
            row: of the table.
            learning_rate: of all rows.
            steps: by default the scale's.
        """
        scale, config = self._scale, base.get_config(row.policies)
        tuning = self.name == "instruction"
        config.train_step = steps or (scale.tuning_steps if tuning else scale.steps)
        config.update(log_every=10, checkpoint_every=60, eval_every=0, keep=1, tensorboard=False)
        config.model.update(scale.model)
        config.data.update(source="local", root=str(self._root / study_data.TRAIN), cache_dir=str(self._cache))
        config.data.update(tokenizer=scale.tokenizer, seq_len=scale.seq_len, batch_size=scale.batch_size)
        config.targets.update(source="local", root=str(self._root / study_data.OTHER))
        config.optim.update(learning_rate=learning_rate, warmup_ratio=0.1)
        config.eval_rows = scale.measured if tuning else scale.looked_at
        config.targets.group_rows = scale.looked_at if tuning else scale.measured
        if tuning:
            config.model.update(name_or_path=str(self.base), from_scratch=False)
            config.data.update(formatting="alpaca", template="alpaca", cutoff_len=scale.cutoff_len)
            config.data.update(buckets=(scale.cutoff_len,), tokenizer=str(self.base))
            config.data.max_samples = scale.candidates
            config.targets.formatting = "alpaca"
            third = Share(1 / 3).of(config.train_step)
            config.update(warmup_step=third, update_step=third)
        fields = {
            name: value.of(config.train_step) if isinstance(value, Share) else value
            for name, value in row.fields.items()
        }
        config.update_from_flattened_dict(fields)
        return config

    def losses(self, name: str, row: Row, learning_rate: float) -> Losses:
        """Of a row's models on what the study measures; trains those that are not there yet.

        Raises:
            TrainingError: asked to stop; the same command goes on.
        """
        done = self._folder / name / "row.json"
        if done.exists():
            saved = read_json(done)
            return Losses(tuple(saved["groups"]), np.array(saved["values"]), saved["trained"], saved["cpu_seconds"])
        begun = self._folder / name / "begun"
        interrupted = begun.exists()
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
        started = time.process_time()
        config, count = self.config(row, learning_rate), len(self._seeds)
        if name in study_rows.ALONE:
            groups, values = self._alone(name, config)
        else:
            mixtures, trained = self._mixtures(name, learning_rate)
            groups, values = self._mapped(name, config, self._seeds, mixtures, tuned=False)
            count += trained
        seconds = None if interrupted else time.process_time() - started
        found = Losses(groups, values, count, seconds)
        replace_json(done, found._asdict() | {"values": values.tolist()})
        return found

    def tuned(self, baseline: Row) -> dict[float, Float64[np.ndarray, " n"]]:
        """The average loss over domains by learning rate, a model a value, on rows that are not the study's."""
        seeds = range(_OTHERS, _OTHERS + self._scale.tried)
        found = {}
        for rate in self._scale.rates[self.name]:
            config = self.config(baseline, rate)
            _, values = self._mapped(f"rate-{rate:g}", config, seeds, None, tuned=True)
            found[rate] = values.mean(axis=1)
        return found

    def train_base(self, folder: Path, learning_rate: float) -> None:
        """Trains the model that instructions are for."""
        config = self.config(Row("base"), learning_rate, self._scale.base_steps)
        config.seed, config.data.seq_len = _OTHERS, self._scale.cutoff_len
        _finished(config, folder)

    def _mapped(
        self,
        name: str,
        config: ConfigDict,
        seeds: Sequence[int],
        mixtures: Sequence[np.ndarray] | None,
        *,
        tuned: bool,
    ) -> tuple[tuple[str, ...], Float64[np.ndarray, "n G"]]:
        config.seed = seeds[0]
        given = [None] * len(seeds) if mixtures is None else mixtures
        members = [Member(f"seed {seed}", seed, mixture) for seed, mixture in zip(seeds, given, strict=True)]
        with opened(config, self._folder / name, whole_pool=self.name == "instruction") as shared:
            targets = self._measured(shared, tuned=tuned)
            values = train_and_measure(shared, members, [targets])
        if values is None:
            raise _stopped(self._folder / name)
        return targets.names, values

    def _measured(self, shared: Shared, *, tuned: bool) -> TargetSet:
        """Rows that no policy looks at; for tuning, those that policies may look at."""
        config, inputs = shared.experiment.config, shared.experiment.inputs
        if (self.name == "instruction") != tuned:
            return held_out(inputs.domains, config.eval_rows)
        return open_targets(config, inputs.domains, inputs.tokenizer_source)

    def _alone(self, name: str, config: ConfigDict) -> tuple[tuple[str, ...], Float64[np.ndarray, "n G"]]:
        groups, values = (), []
        for seed in self._seeds:
            config.seed = seed
            folder = self._folder / name / f"seed{seed}"
            _finished(config.copy_and_resolve_references(), folder)
            domains = read_jsonl(folder / "eval.jsonl")[-1]["domains"]
            groups = tuple(domains)
            values.append([domains[group]["nll"] for group in groups])
        return groups, np.array(values)

    def _mixtures(self, name: str, learning_rate: float) -> tuple[list[np.ndarray] | None, int]:
        """The mixture of each model where it comes from models, and how many these are."""
        find: Callable | None = {"doremi": self._of_doremi, "swarm": self._of_a_swarm}.get(name)
        return (None, 0) if find is None else find(learning_rate)

    def _of_doremi(self, learning_rate: float) -> tuple[list[np.ndarray], int]:
        folder, found = self._folder / "doremi", []
        reference = folder / "reference"
        config = self.config(Row("reference"), learning_rate)
        config.seed = _OTHERS
        _finished(config, reference)
        for seed in self._seeds:
            proxy = folder / f"proxy{seed}"
            config = self.config(Row("proxy", "mixer=doremi"), learning_rate)
            config.seed, config.mixer.reference = seed, str(reference)
            _finished(config, proxy)
            names = list(read_json(proxy / WEIGHTS_FILE)["domains"])
            found.append(np.array(read_weights(proxy / WEIGHTS_FILE, names), np.float64))
        return found, 1 + len(self._seeds)

    def _of_a_swarm(self, learning_rate: float) -> tuple[list[np.ndarray], int]:
        folder = self._folder / "swarm" / "swarm"
        config = self.config(Row("swarm"), learning_rate)
        config.seed, config.eval_rows, config.targets.source = _OTHERS, self._scale.measured, None
        design = Design(runs=self._scale.swarm, natural=True)
        with opened_swarm(config, folder) as models:
            if not swarm.train(models, design):
                raise _stopped(folder)
            runs = tables.read(folder / tables.RATIOS, folder / tables.METRICS)
            most = proposal.caps(models.tokens, config.train_step * config.data.batch_size * config.data.seq_len)
            found = fitting.found(runs, models.natural, most, config.seed)
            swarm_results.write(folder, found, None)
            print(swarm_results.table(found))
        return [found.proposal] * len(self._seeds), design.runs + 1


def _finished(config: ConfigDict, folder: Path) -> None:
    """Trains a model alone, unless it is there.

    Raises:
        TrainingError: asked to stop.
    """
    if not (folder / "summary.json").exists() and train_and_evaluate(config, folder).preempted:
        raise _stopped(folder)


def _stopped(folder: Path) -> TrainingError:
    return TrainingError(f"{folder}: stopped before the end; the same command goes on")
