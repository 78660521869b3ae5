"""Puts a run together: its data, the step of what it learns, and what its policies decide between two steps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dataflex_jax import preemption
from dataflex_jax.data import epoch_limits
from dataflex_jax.data.domains import Domain, open_domains
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.record_numbers import record_numbers
from dataflex_jax.data.sampler import Sampler
from dataflex_jax.data.targets import open_targets
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.data.window import Sequences
from dataflex_jax.models.model import Model
from dataflex_jax.policies.active import ActivePolicies, weighter_sections
from dataflex_jax.policies.proportions import starting_proportions
from dataflex_jax.policies.registry import KINDS
from dataflex_jax.policies.signals import TARGETS
from dataflex_jax.reporting.hardware import total_peak_flops
from dataflex_jax.reporting.run_log import LogSettings
from dataflex_jax.selection.windows import Draws, Selection
from dataflex_jax.sharding import replicated, shardings
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training.between import Updates
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.evaluation import EvaluationContext, evaluators
from dataflex_jax.training.job import Cadence, Job
from dataflex_jax.training.learner import Learner
from dataflex_jax.training.ledger import Publishing
from dataflex_jax.training.reference import Cache, reference_losses
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
        InputError: a reference or a target set that cannot be read or does not fit.
        StopRequested: before the first step.
    """
    config, inputs, policies, learner, identity = experiment
    data, pool = config.data, inputs.pool
    sweeper = Sweeper(place.mesh, rows=config.sweep.batch_rows, poll=preemption.polling(place.stop_requested))
    signals = _signals(experiment, place, sweeper)
    how = dataclasses.replace(How.of(config), lora=None, trainable=None)
    reference, cached = reference_losses(
        policies.reference(),
        inputs.domains,
        inputs.tokenizer,
        signals.candidates,
        sweeper,
        Cache(data.cache_dir, data.verify),
        policies.reference_option(weighter_sections(config)),
        how,
    )
    groups = pool.groups(by_domain=policies.by_domain)
    sampler = Sampler(config.seed, data.batch_size, data.draw, _most_rows(config, inputs))
    draws = Draws(pool, groups, sampler, Sequences(groups, config.seed))
    selection = None
    if policies.selector or policies.order:
        selection = Selection(policies, draws, config.train_step, place.folder)
    context = EvaluationContext(config, inputs.domains, inputs.tokenizer, place.mesh)
    return Job(
        policies=policies,
        step=_jitted_step(experiment, reference, place.mesh),
        model=learner.model.with_params,
        updates=Updates(policies, selection, signals.of),
        evaluators=evaluators(context),
        draws=draws,
        loader=Loader(pool, place.mesh, cached | record_numbers(policies.records(), pool, data)),
        publishing=Publishing(policies.mixer.schedule, data.lag),
        cadence=Cadence(config.train_step, config.checkpoint_every),
        log=_log_settings(experiment),
        identity=identity,
        checkpoints=place.checkpoints,
        stop_requested=place.stop_requested,
    )


def _most_rows(config: ConfigDict, inputs: Inputs) -> tuple[int, ...] | None:
    rows = {domain.name: domain.train.num_rows for domain in inputs.domains}
    sizes, data = np.array(list(rows.values())), config.data
    proportions = np.asarray(starting_proportions("proportions", data.proportions, sizes))
    most = epoch_limits.most_rows(data.max_epochs, rows, proportions)
    epoch_limits.check_room(data.max_epochs, most, config.train_step * data.batch_size)
    return most


def _signals(experiment: Experiment, place: Place, sweeper: Sweeper) -> RunSignals:
    config, inputs, policies, learner, _ = experiment
    targets = None
    if policies.needs(TARGETS):
        target_set = open_targets(config, inputs.domains, inputs.tokenizer_source)
        targets = target_set, source(target_set.pool, place.mesh)
    candidates = source(inputs.pool, place.mesh)
    return RunSignals(config, learner.model, learner.learning_rate, sweeper, candidates, targets)


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


def _jitted_step(experiment: Experiment, reference: Model | None, mesh: Mesh) -> Callable:
    config, _, policies, learner, _ = experiment
    step = TrainStep(
        learner.start.model,
        learner.start.optimizer,
        learner.learning_rate,
        policies.mixer,
        policies.weighters,
        grad_accumulation=config.data.grad_accumulation,
        weigh_microbatches=config.data.weigh_over == "microbatch",
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(learner.abstract), replicated(mesh)))
    return functools.partial(jitted, fixed=Fixed(learner.frozen, reference))
