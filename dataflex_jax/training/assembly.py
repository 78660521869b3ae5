"""Puts a run together: its data, the step of what it learns, and what its policies decide between two steps."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dataflex_jax import preemption
from dataflex_jax.data.domains import Domain, open_domains
from dataflex_jax.data.loader import Batch, Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sampler import Sampler
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.data.window import Sequences
from dataflex_jax.models import lora
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.reporting.hardware import total_peak_flops
from dataflex_jax.selection.windows import Selection
from dataflex_jax.sharding import replicated, shardings
from dataflex_jax.signals.sweep import Sweeper
from dataflex_jax.training import resume
from dataflex_jax.training.between import Updates
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.evaluation import make_evaluate
from dataflex_jax.training.job import Cadence, Job
from dataflex_jax.training.learner import Learner
from dataflex_jax.training.reference import ReferenceModel, reference_losses
from dataflex_jax.training.resume import Identity
from dataflex_jax.training.run_signals import RunSignals
from dataflex_jax.training.step import Fixed, TrainState, TrainStep


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


def open_inputs(data: ConfigDict, run_folder: Path, *, new: bool) -> Inputs:
    """Opens `config.data`, tokenising what is not in the cache yet; a request to stop ends it at once.

    Args:
        data: `config.data`.
        run_folder: keeps the tokenizer.
        new: whether the run begins here; otherwise it goes on with the tokenizer that it has kept.

    Raises:
        InputError: bad input or options.
        StopRequested: what was tokenised until then is kept.
    """
    with preemption.interruptible():
        domains, tokenizer = open_domains(data if new else resume.with_saved_tokenizer(data, run_folder))
    source = _saved_tokenizer(tokenizer, data.tokenizer, run_folder, new=new)
    return Inputs(domains, tokenizer, source, Pool(domains))


def _saved_tokenizer(tokenizer: Tokenizer, source: str, run_folder: Path, *, new: bool) -> str:
    """Where to read the tokenizer from again: where it came from, or the run folder if the run trained it."""
    if new and jax.process_index() == 0:
        tokenizer.save(run_folder / "tokenizer")
    multihost_utils.sync_global_devices("the tokenizer is saved")
    return str(run_folder / "tokenizer") if source.startswith("train:") else source


def assemble(
    config: ConfigDict,
    inputs: Inputs,
    policies: ActivePolicies,
    learner: Learner,
    identity: Identity,
    checkpoints: Checkpoints,
    run_folder: Path,
    mesh: Mesh,
    stop_requested: Callable[[int], bool],
) -> Job:
    """Puts the run together; computes the reference model's losses where they are to be cached and are not yet.

    Args:
        config: of the run.
        inputs: its data.
        policies: of the run.
        learner: what is trained.
        identity: what checkpoints remember.
        checkpoints: of the run.
        run_folder: selections are written there.
        mesh: the devices.
        stop_requested: whether to save and stop after a step.

    Raises:
        InputError: a reference or a target set that cannot be read or does not fit.
        StopRequested: before the first step.
    """
    data, domains, pool = config.data, inputs.domains, inputs.pool
    sweeper = Sweeper(mesh, rows=config.sweep.batch_rows, poll=preemption.polling(stop_requested))
    signals = RunSignals(
        config, learner.graphdef, learner.frozen, pool, domains, inputs.tokenizer_source, sweeper, mesh, policies
    )
    reference, cached = reference_losses(
        policies.reference, domains, inputs.tokenizer, signals.rows, sweeper, data, mesh
    )
    sampler, groups = Sampler(config.seed, data.batch_size, data.draw), pool.groups(by_domain=policies.by_domain)
    sequences = Sequences(groups, config.seed)
    selection = None
    if policies.selecting or policies.ordering:
        choosers = (policies.selecting, policies.ordering)
        selection = Selection(*choosers, pool, groups, sampler, sequences, signals.of, config.train_step, run_folder)
    rows_a_batch = data.batch_size // data.grad_accumulation
    gradients = functools.partial(signals.domain_gradients, learning_rate=learner.learning_rate, rows=rows_a_batch)
    evaluate = make_evaluate(learner.graphdef, domains, rows_a_batch, config.eval_rows, mesh)
    return Job(
        step=_jitted_step(config, policies, learner, reference, mesh),
        evaluate=lambda params: evaluate(lora.combine(learner.frozen, params)),
        between=Updates(policies, selection, signals.of, gradients).between,
        selection=selection,
        stop_requested=stop_requested,
        sampler=sampler,
        sequences=sequences,
        loader=Loader(pool, mesh, cached),
        pool=pool,
        domains=domains,
        mixer=config.mixer.name if config.mixer else None,
        policies=any(config[kind] for kind in registry.KINDS),
        average=policies.mixer.average,
        schedule=policies.schedule,
        lag=data.lag,
        cadence=Cadence(config.train_step, config.log_every, config.eval_every, config.checkpoint_every),
        identity=identity,
        checkpoints=checkpoints,
        flops_per_token=learner.model.flops_per_token(max(pool.buckets)),
        peak_flops=total_peak_flops(),
        tensorboard=config.tensorboard,
        wandb_project=config.wandb_project,
    )


def _jitted_step(
    config: ConfigDict, policies: ActivePolicies, learner: Learner, reference: ReferenceModel | None, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    step = TrainStep(
        learner.graphdef,
        learner.optimizer,
        learner.learning_rate,
        policies.mixer,
        policies.schedule,
        weighters=policies.weighters,
        reference_graphdef=reference and reference.graphdef,
        grad_accumulation=config.data.grad_accumulation,
        weigh_microbatches=config.data.weigh_over == "microbatch",
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(learner.abstract), replicated(mesh)))
    return functools.partial(jitted, fixed=Fixed(learner.frozen, reference and reference.params))
