"""From a configuration to a job with its state: a fresh one, or the newest checkpoint's."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax import preemption
from dataflex_jax.data.loader import check_rows
from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import active_policies
from dataflex_jax.policies.proportions import starting_proportions
from dataflex_jax.processes import group
from dataflex_jax.reporting.trackers import import_wandb
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import agreement, changes, duration, fits, loop, resume, run_config
from dataflex_jax.training.assembly import Experiment, Inputs, Place, assemble, open_inputs
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.domain_weights import with_weights_files
from dataflex_jax.training.entries import check_entries
from dataflex_jax.training.evaluation import check_evaluators
from dataflex_jax.training.job import Job, Outcome
from dataflex_jax.training.learner import fresh_state, make_learner
from dataflex_jax.training.ledger import Position
from dataflex_jax.training.locate import choose_tokenizer, keep_begin_of_text, run_at
from dataflex_jax.training.state import TrainState

logger = logging.getLogger(__name__)


def train_and_evaluate(config: ConfigDict, run_folder: Path) -> Outcome:
    """Runs a configuration to its end, from the newest checkpoint in `run_folder` if there is one.

    Raises:
        InputError: a configuration or an input that cannot be run, in one line.
        TrainingError: a run that cannot go on.
    """
    if (finished := _finished_read_only(config, run_folder)) is not None:
        return finished
    try:
        with prepared(config, run_folder) as (job, state, position):
            return loop.run(job, state, position, run_folder)
    except preemption.StopRequested:
        # While something was prepared for the first step, such as cached losses, which a later run goes on with.
        return Outcome(step=0, preempted=True)


@contextlib.contextmanager
def prepared(config: ConfigDict, run_folder: Path) -> Iterator[tuple[Job, TrainState, Position]]:
    """All that the loop needs, with the mesh set: a fresh state, or the newest checkpoint's in `run_folder`.

    Raises:
        InputError: a configuration or an input that cannot be run, in one line.
    """
    agreement.agree_on_configuration(config)
    configuration.validate(config)
    if config.data.tokenizer is None:
        choose_tokenizer(config)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size, config.data.grad_accumulation)
    records = active_policies(config).records()  # refuses what it can before any data is read
    if records is not None and records.of == "turns":
        config.data.weight_key = records.field
    check_evaluators(config)
    fits.check_tokenizer(config)
    if config.wandb_project is not None and jax.process_index() == 0:
        import_wandb(config.wandb_project)

    agreement.agree_on_run_folder(run_folder)
    check_entries(run_folder)
    with Checkpoints(run_folder, config.keep) as checkpoints, jax.set_mesh(mesh):
        group.at_loss(checkpoints.newest)
        latest = checkpoints.newest_sound()
        before = changes.last_started_with(run_folder) if latest else None
        if before is not None:
            keep_begin_of_text(config.data, before)
        changes.check_tokenizer(changes.changed(before, config))
        inputs = open_inputs(config.data, run_folder, latest)
        duration.settle(config, inputs.pool.num_rows)
        changed = changes.changed(before, config)
        agreement.agree({"the newest checkpoint": latest} | _found(inputs) | agreement.plugins(config))
        experiment = make_experiment(config, inputs, mesh)
        learner, identity = experiment.learner, experiment.identity
        if latest is None:
            state, position = fresh_state(learner, experiment.config), resume.beginning(identity)
        else:
            mixer = experiment.policies.mixer
            start, abstract = learner.start, learner.abstract
            state, position = resume.restore(checkpoints, latest, identity, mixer, start, abstract, changed)
            logger.info("Going on from step %d of %s.", latest, run_folder)
            changes.say(changed, before, config, latest)
        if jax.process_count() > 1:
            agreement.agree(agreement.flattened(identity._asdict(), "the run") | agreement.weights(config))
        if jax.process_index() == 0:
            run_config.write(config, run_folder / "config.json", latest if before is not None else 0)
        with preemption.watch() as stop_requested:
            job = assemble(experiment, Place(mesh, run_folder, checkpoints, stop_requested))
            if position.sampler.step > 0 and job.selection is not None:
                job.selection.restore(checkpoints.read_selection(latest))
            yield job, state, position


def _found(inputs: Inputs) -> dict[str, str]:
    contents = {f"the data of domain {domain.name!r}": domain.key for domain in inputs.domains}
    return {"the tokenizer": inputs.tokenizer.fingerprint} | contents


def _finished_read_only(config: ConfigDict, run_folder: Path) -> Outcome | None:
    """How a run ended in a folder that cannot be written; None: it can, or there is no run in it.

    Raises:
        InputError: the run has not come to its end.
    """
    if os.access(run_folder, os.W_OK) or run_at(run_folder, "--workdir") is None:
        return None
    with Checkpoints(run_folder, writable=False) as checkpoints:
        step = checkpoints.latest()
        train_step = config.train_step or run_config.read(run_folder).train_step
        if step < train_step:
            done = f"{step} of config.train_step = {train_step} steps are done"
            raise InputError(f"--workdir={run_folder}: cannot be written, and only {done}; go on in a copy of it")
        return Outcome(step, False, checkpoints.read_run(step)["tokens_seen"])


def make_experiment(
    config: ConfigDict, inputs: Inputs, mesh: jax.sharding.Mesh, *, whole_pool: bool = False
) -> Experiment:
    """What a run is, of its configuration and its data.

    Args:
        config: of the run.
        inputs: its data.
        mesh: the devices.
        whole_pool: whether rows are drawn from the pool as a whole, whatever the policies are.

    Raises:
        InputError: proportions, a model or frozen parameters that are refused; see `make_learner`.
    """
    config = with_weights_files(config, [domain.name for domain in inputs.domains])
    policies = active_policies(config)
    if whole_pool:
        policies = policies.from_whole_pool()
    sizes = np.diff(inputs.pool.offsets)
    proportions = registry.checked("data", starting_proportions, "proportions", config.data.proportions, sizes)
    policies = policies.drawing(proportions)
    learner = make_learner(config, inputs.tokenizer.vocab_size, policies, proportions, mesh)
    fits.warn_of_long_rows(config, learner.model.config, max(inputs.pool.buckets))
    identity = resume.identify(
        config,
        learner.model.config,
        inputs.tokenizer,
        inputs.domains,
        policies,
        policies.mixer.policy.sampling_weights(learner.start.mixer),
        learner.base and learner.base.identity(),
    )
    return Experiment(config, inputs, policies, learner, identity)
