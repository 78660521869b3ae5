"""Trains a language model while policies decide what it trains on.

    python -m dataflex_jax.train --config=configs/odm.py[:variant] [--workdir=DIR] [--config.field=value ...]

The same command again goes on from the newest checkpoint in the run folder. Several hosts: start it on each one under
SLURM or Open MPI, or give --coordinator, --num_processes and --process_id.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli, preemption
from dataflex_jax import config as configuration
from dataflex_jax.data.loader import check_rows
from dataflex_jax.policies import registry
from dataflex_jax.policies.active import active_policies
from dataflex_jax.policies.proportions import starting_proportions
from dataflex_jax.reporting.summary import write_results
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import loop, resume
from dataflex_jax.training.assembly import assemble, open_inputs
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.domain_weights import with_weights_files
from dataflex_jax.training.job import Job, Outcome
from dataflex_jax.training.learner import fresh_state, make_learner
from dataflex_jax.training.resume import Position
from dataflex_jax.training.step import TrainState

logger = logging.getLogger(__name__)


def train_and_evaluate(config: ConfigDict, run_folder: Path) -> Outcome:
    """Runs a configuration to its end, from the newest checkpoint in `run_folder` if there is one.

    Raises:
        InputError: a configuration or an input that cannot be run, in one line.
        TrainingError: a run that cannot go on.
    """
    try:
        with prepared(config, run_folder) as (job, state, position):
            return loop.run(job, state, position, run_folder)
    except preemption.StopRequested:
        # While something was prepared for the first step, such as cached losses, which a later run goes on with.
        return Outcome(0, True, 0, None, None)


@contextlib.contextmanager
def prepared(config: ConfigDict, run_folder: Path) -> Iterator[tuple[Job, TrainState, Position]]:
    """All that the loop needs, with the mesh set: a fresh state, or the newest checkpoint's in `run_folder`.

    Raises:
        InputError: a configuration or an input that cannot be run, in one line.
    """
    configuration.validate(config)
    registry.load_plugins(config.plugins)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size, config.data.grad_accumulation)
    active_policies(config)  # refuses what it can before any data is read

    with Checkpoints(run_folder, config.keep) as checkpoints, jax.set_mesh(mesh):
        latest = checkpoints.latest()
        inputs = open_inputs(config.data, run_folder, new=latest is None)
        given, config = config, with_weights_files(config, [domain.name for domain in inputs.domains])
        policies = active_policies(config)
        proportions = registry.checked(
            "data", starting_proportions, "proportions", config.data.proportions, np.diff(inputs.pool.offsets)
        )
        learner = make_learner(config, inputs.tokenizer, policies, proportions, mesh)
        identity = resume.identify(
            config,
            learner.model,
            inputs.tokenizer,
            inputs.domains,
            policies.mixer.sampling_weights(learner.mixer),
            policies.names(),
            learner.base and learner.base.identity(),
            by_domain=policies.by_domain,
        )
        if latest is None:
            state, position = fresh_state(learner, config), resume.beginning(identity)
        else:
            state, position = resume.restore(
                checkpoints, latest, identity, policies.mixer, policies.schedule, learner.abstract, learner.mixer
            )
            logger.info("Going on from step %d of %s.", latest, run_folder)
        if jax.process_index() == 0:
            configuration.write(given, run_folder / "config.json")
        with preemption.watch() as stop_requested:
            job = assemble(config, inputs, policies, learner, identity, checkpoints, run_folder, mesh, stop_requested)
            if latest is not None and job.selection is not None:
                job.selection.restore(checkpoints.read_selection(latest))
            yield job, state, position


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    config = cli.chosen_config(CONFIG)
    run_folder = Path(WORKDIR.value or cli.default_run_folder(CONFIG))
    cli.initialize_distributed(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if jax.config.jax_compilation_cache_dir is None:
        # So that a restart compiles nothing.
        jax.config.update("jax_compilation_cache_dir", str(Path(config.data.cache_dir).expanduser() / "compilations"))
    outcome = train_and_evaluate(config, run_folder)
    if outcome.preempted and outcome.step == 0:
        print("Stopped on request before the first step; the same command begins anew.")
    elif outcome.preempted:
        print(f"Stopped on request after step {outcome.step}, saved; the same command goes on from there.")
    elif jax.process_index() == 0:
        write_results(run_folder, outcome)


if __name__ == "__main__":
    # Not on import: other commands have flags of the same names, and absl holds all flags in one place.
    CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/odm.py:slimpajama-6b.")
    WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; by default runs/RECIPE[-VARIANT].")
    COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster manager tells it.")
    NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is.")
    cli.run(main)
