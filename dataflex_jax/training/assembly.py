"""Puts a run together: its data, the step of what it learns, and what its policies decide between two steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dataflex_jax import gpu_compiler, preemption
from dataflex_jax.data import epoch_limits
from dataflex_jax.data.domains import Domain, open_domains
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.record_numbers import record_numbers
from dataflex_jax.data.sampler import Sampler
from dataflex_jax.data.targets import TargetSet, open_targets
from dataflex_jax.data.targets import held_out as open_held_out
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.data.texts import row_texts
from dataflex_jax.data.window import Sequences
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import ActivePolicies, weighter_sections
from dataflex_jax.policies.proportions import starting_proportions
from dataflex_jax.policies.registry import KINDS
from dataflex_jax.policies.signals import HELD_OUT, TARGETS, WHOLE_ROWS, FixedEmbeddings
from dataflex_jax.reporting.hardware import total_peak_flops
from dataflex_jax.reporting.run_log import LogSettings
from dataflex_jax.selection.windows import Draws, Selection
from dataflex_jax.sharding import replicated, shardings
from dataflex_jax.signals.products import check_routed
from dataflex_jax.signals.row_sets import Matrix
from dataflex_jax.signals.rows import selected_paths
from dataflex_jax.signals.sweep import Source, Sweeper, source
from dataflex_jax.training.between import Updates
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.embeddings import Embedded, fixed_embeddings
from dataflex_jax.training.evaluation import EvaluationContext, evaluators
from dataflex_jax.training.job import Cadence, Job
from dataflex_jax.training.learner import Learner
from dataflex_jax.training.ledger import Publishing
from dataflex_jax.training.oversampling import Oversampling, TargetDraws, check_compared
from dataflex_jax.training.reference import Cache, OfRow, reference_losses
from dataflex_jax.training.resume import Identity
from dataflex_jax.training.run_signals import RunSignals
from dataflex_jax.training.state import Fixed
from dataflex_jax.training.step import TrainStep
from dataflex_jax.training.weights import How


class Inputs(NamedTuple):
    """The data of a run.

    Attributes:
        domains: the K domains.
        tokenizer: of all of them.
        tokenizer_source: where to read it from again, as a value of `config.data.tokenizer`.
        pool: the training rows.
    """

    domains: Sequence[Domain]
    tokenizer: Tokenizer
    tokenizer_source: str
    pool: Pool


class Experiment(NamedTuple):
    """What a run is.

    Attributes:
        config: as it was given, with numbers in place of weights files.
        inputs: its data.
        policies: at work.
        learner: what is trained.
        identity: what checkpoints remember.
    """

    config: ConfigDict
    inputs: Inputs
    policies: ActivePolicies
    learner: Learner
    identity: Identity


class Place(NamedTuple):
    """Where a run is.

    Attributes:
        mesh: the devices.
        folder: the run folder.
        checkpoints: in it.
        stop_requested: whether to save and stop after a step.
    """

    mesh: Mesh
    folder: Path
    checkpoints: Checkpoints
    stop_requested: Callable[[int], bool]


def open_inputs(data: ConfigDict, run_folder: Path, step: int | None) -> Inputs:
    """Opens `config.data`, tokenising what is not in the cache yet; a request to stop ends it at once.

    Args:
        data: `config.data`.
        run_folder: keeps the tokenizer.
        step: of the newest checkpoint; 0: of imported weights; None: there is none. A run goes on with the tokenizer
            that it has trained and kept, as further domains would train another one.

    Raises:
        InputError: bad input or options.
        StopRequested: what was tokenised until then is kept.
    """
    kept, made = run_folder / "tokenizer", data.tokenizer.startswith("train:")
    if made and step is not None:
        data = data.copy_and_resolve_references()
        data.tokenizer = str(kept)
    with preemption.interruptible():
        domains, tokenizer = open_domains(data)
    if not step and jax.process_index() == 0:
        tokenizer.save(kept)  # imported ones too, which have no template of the data yet
    multihost_utils.sync_global_devices("the tokenizer is saved")
    return Inputs(domains, tokenizer, str(kept) if made else data.tokenizer, Pool(domains))


def assemble(experiment: Experiment, place: Place) -> Job:
    """Puts the run together; computes the reference model's losses where they are to be cached and are not yet.

    Raises:
        InputError: a reference or a target set that cannot be read or does not fit, or a projection that there is none
            of for the trained parameters.
        StopRequested: before the first step.
    """
    config, inputs, policies, learner, identity = experiment
    data, pool = config.data, inputs.pool
    if policies.needs(WHOLE_ROWS):
        check_routed(selected_paths(learner.abstract.params), "selector")  # not only at its first update
    sweeper = Sweeper(place.mesh, rows=config.sweep.batch_rows, poll=preemption.polling(place.stop_requested))
    signals = run_signals(experiment, place.mesh, sweeper)
    reference, cached = compared_with(experiment, signals.candidates, sweeper)
    oversampling, compared = _oversampling(experiment, place, signals)
    groups = pool.groups(by_domain=policies.by_domain)
    sampler = _sampler(config, inputs, oversampling)
    draws = Draws(pool, groups, sampler, Sequences(groups, config.seed))
    selection = None
    if policies.selector or policies.order:
        decode = inputs.tokenizer.decode if config.selector and config.selector.save_examples else None
        selection = Selection(policies, draws, config.train_step, place.folder, decode)
    context = EvaluationContext(config, inputs.domains, inputs.tokenizer, place.mesh)
    return Job(
        policies=policies,
        step=_jitted_step(experiment, reference, oversampling, place.mesh),
        model=learner.model.with_params,
        updates=Updates(policies, selection, signals.of),
        evaluators=evaluators(context),
        draws=draws,
        loader=Loader(pool, place.mesh, cached | record_numbers(policies.records(), pool, data)),
        compared=compared,
        publishing=Publishing(policies.mixer.schedule, data.lag),
        cadence=Cadence(config.train_step, config.checkpoint_every),
        log=_log_settings(experiment),
        identity=identity,
        checkpoints=place.checkpoints,
        stop_requested=place.stop_requested,
    )


def compared_with(
    experiment: Experiment, candidates: Source, sweeper: Sweeper
) -> tuple[Model | None, dict[str, OfRow]]:
    """The reference of the policies as `reference_losses` gives it.

    Args:
        experiment: whose policies may want one.
        candidates: the training rows.
        sweeper: computes losses that are to be cached and are not yet.

    Raises:
        InputError: see `reference_losses`.
    """
    config, inputs, policies, _, _ = experiment
    return reference_losses(
        policies.reference(),
        inputs.domains,
        inputs.tokenizer,
        candidates,
        sweeper,
        Cache(config.data.cache_dir, config.data.verify),
        policies.reference_option(weighter_sections(config)),
        dataclasses.replace(How.of(config), lora=None, trainable=None),
    )


def run_signals(experiment: Experiment, mesh: Mesh, sweeper: Sweeper) -> RunSignals:
    """What the run's policies may ask of a state's model.

    Raises:
        InputError: a target set that is needed and cannot be read.
    """
    config, inputs, policies, learner, _ = experiment
    targets, fixed = asked_for(config, policies, inputs, sweeper)
    held_out = None
    if policies.needs(HELD_OUT):
        held_out_set = open_held_out(inputs.domains, config.eval_rows)
        held_out = held_out_set, source(held_out_set.pool, mesh)
    candidates = source(inputs.pool, mesh)
    read = functools.partial(row_texts, tokenizer=inputs.tokenizer)
    data = (candidates, targets, held_out, fixed, read, inputs.tokenizer)
    return RunSignals(config, learner.model, learner.learning_rate, sweeper, *data)


def asked_for(
    config: ConfigDict, policies: ActivePolicies, inputs: Inputs, sweeper: Sweeper
) -> tuple[tuple[TargetSet, Source] | None, Mapping[FixedEmbeddings, tuple[Matrix, Matrix]]]:
    """(the target set and its rows, where a policy needs it; embeddings that stay as they are), made ready.

    Raises:
        InputError: a target set that cannot be read, or embeddings that cannot be had.
        StopRequested: what was computed is kept.
    """
    wanted = policies.fixed_embeddings()
    if not policies.needs(TARGETS) and not wanted:
        return None, {}
    targets = open_targets(config, inputs.domains, inputs.tokenizer_source)
    fixed = {}
    if wanted:
        candidates = Embedded("candidates", inputs.pool, np.arange(inputs.pool.num_rows), inputs.tokenizer)
        of_targets = Embedded("targets", targets.pool, targets.ids, inputs.tokenizer)
        cache = Cache(config.data.cache_dir, config.data.verify)
        fixed = fixed_embeddings(wanted, candidates, of_targets, sweeper, cache, How.of(config))
    return (targets, source(targets.pool, sweeper.mesh)), fixed


def _sampler(config: ConfigDict, inputs: Inputs, oversampling: Oversampling | None) -> Sampler:
    data, rows = config.data, {domain.name: domain.train.num_rows for domain in inputs.domains}
    rows_of = None if oversampling is None else oversampling.drawn
    sizes = np.array(list(rows.values()))
    proportions = np.asarray(starting_proportions("proportions", data.proportions, sizes))
    most = epoch_limits.most_rows(data.max_epochs, rows, proportions)
    sampler = Sampler(config.seed, data.batch_size, data.draw, rows_of, most)
    if most is not None:
        epoch_limits.check_room(data.max_epochs, most, sum(map(sampler.rows, range(1, config.train_step + 1))))
    return sampler


def _log_settings(experiment: Experiment) -> LogSettings:
    config, inputs, policies, learner, _ = experiment
    return LogSettings(
        domains={domain.name: domain.train.num_rows for domain in inputs.domains},
        mixer=policies.mixer.name if policies.mixes else None,
        mixer_log=policies.mixer.policy.log,
        policies=any(config[kind] for kind in KINDS) or config.data.max_epochs is not None,
        log_every=config.log_every,
        train_step=config.train_step,
        tensorboard=config.tensorboard,
        wandb_project=config.wandb_project,
        config=config.to_dict(),
        flops_per_token=learner.model.config.flops_per_token(max(inputs.pool.buckets)),
        peak_flops=total_peak_flops(),
    )


def _oversampling(
    experiment: Experiment, place: Place, signals: RunSignals
) -> tuple[Oversampling | None, TargetDraws | None]:
    config, _, policies, learner, _ = experiment
    if policies.online is None:
        return None, None
    oversampling = Oversampling(policies.online, config.data.batch_size, config.data.grad_accumulation)
    target_rows = policies.online.policy.online.target_rows
    if not target_rows:
        return oversampling, None
    check_compared(policies.online.name, learner.abstract.params)
    return oversampling, TargetDraws(*signals.targets, target_rows, config.seed, place.mesh)


def train_step(experiment: Experiment, oversampling: Oversampling | None = None) -> TrainStep:
    """The step, not jitted.

    Args:
        experiment: whose step.
        oversampling: which of the drawn rows it trains on; None: all.
    """
    config, _, policies, learner, _ = experiment
    return TrainStep(
        learner.start.model,
        learner.start.optimizer,
        learner.learning_rate,
        policies.mixer,
        policies.weighters,
        grad_accumulation=config.data.grad_accumulation,
        weigh_microbatches=config.data.weigh_over == "microbatch",
        oversampling=oversampling,
    )


def _jitted_step(
    experiment: Experiment, reference: Model | None, oversampling: Oversampling | None, mesh: Mesh
) -> Callable:
    learner, step = experiment.learner, train_step(experiment, oversampling)
    on_gpus, scanned = mesh.devices.flat[0].platform == "gpu", learner.start.model.config.scan_layers
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings(learner.abstract), replicated(mesh)),
        compiler_options=gpu_compiler.options(scanned) if on_gpus else None,
    )
    return functools.partial(jitted, fixed=Fixed(learner.frozen, reference))
