"""Trains a language model while policies decide what it trains on.

    python -m dataflex_jax.train --config=configs/odm.py[:variant] [--workdir=DIR] [--config.field=value ...]

The same command again goes on from the newest checkpoint in the run folder. Several hosts: start it on each one under
SLURM or Open MPI, or give --coordinator, --num_processes and --process_id.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli, loop, optim, preemption, resume
from dataflex_jax import config as configuration
from dataflex_jax.active import active_policies
from dataflex_jax.checkpoint import Checkpoints
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.loader import Loader, check_rows
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sampler import Sampler
from dataflex_jax.data.tokenizer import Tokenizer
from dataflex_jax.data.window import Sequences
from dataflex_jax.evaluation import make_evaluate
from dataflex_jax.hardware import total_peak_flops
from dataflex_jax.job import Cadence, Job, Outcome
from dataflex_jax.models import lora
from dataflex_jax.models.resolve import model_config
from dataflex_jax.policies import registry
from dataflex_jax.policies.mixture_file import with_weights_files
from dataflex_jax.policies.proportions import starting_proportions
from dataflex_jax.reference import reference_losses
from dataflex_jax.resume import Position
from dataflex_jax.run_signals import RunSignals
from dataflex_jax.selection import Selection
from dataflex_jax.sharding import make_mesh, replicated
from dataflex_jax.signals.sweep import Sweeper
from dataflex_jax.state import Fixed, TrainState, TrainStep, abstract_state, init_state
from dataflex_jax.summary import write_results
from dataflex_jax.updates import Updates
from dataflex_jax.weights import open_base, starting_params

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
    given, data = config, config.data
    mesh = make_mesh(config.mesh)
    check_rows(mesh, data.batch_size, data.grad_accumulation)
    policies = active_policies(config)

    with Checkpoints(run_folder, config.keep) as checkpoints, jax.set_mesh(mesh):
        latest = checkpoints.latest()
        domains, tokenizer = open_domains(data if latest is None else resume.with_saved_tokenizer(data, run_folder))
        tokenizer_source = saved_tokenizer(tokenizer, data.tokenizer, run_folder, new=latest is None)
        pool = Pool(domains)
        config = with_weights_files(config, [domain.name for domain in domains])
        policies, data = active_policies(config), config.data
        model = dataclasses.replace(model_config(config.model, tokenizer), lora=lora.lora_config(config.lora))
        base = open_base(config, model, mesh)
        frozen = base and base.params

        num_rows = np.diff(pool.offsets)
        proportions = starting_proportions(data.proportions, num_rows, "config.data.proportions")
        mixer_state = registry.checked("mixer", policies.mixer.init, proportions)
        weighter_states = tuple(weighter.weighter.init(model.hidden_size) for weighter in policies.weighters)
        learning_rate = optim.learning_rate(config.optim, config.train_step)
        optimizer = optim.adamw(config.optim, learning_rate)
        init = functools.partial(init_state, model, optimizer, mixer_state, weighter_states)
        graphdef, abstract = abstract_state(init, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

        initial_weights = policies.mixer.sampling_weights(mixer_state)
        identity = resume.identify(
            config,
            model,
            tokenizer,
            domains,
            initial_weights,
            policies.names(),
            base and base.identity(),
            by_domain=policies.by_domain,
        )
        if latest is None:
            pretrained = starting_params(config, model, base, abstract.params)
            start = jax.jit(lambda key, params: init(key, params)[1], out_shardings=shardings, donate_argnums=1)
            state = start(jax.random.key(config.seed), pretrained)
            position = resume.beginning(identity)
        else:
            state, position = resume.restore(
                checkpoints, latest, identity, policies.mixer, policies.schedule, abstract, mixer_state
            )
            logger.info("Going on from step %d of %s.", latest, run_folder)
        if jax.process_index() == 0:
            configuration.write(given, run_folder / "config.json")

        with preemption.watch() as stop_requested:
            sweeper = Sweeper(mesh, rows=config.sweep.batch_rows, poll=preemption.polling(stop_requested))
            signals = RunSignals(config, graphdef, frozen, pool, domains, tokenizer_source, sweeper, mesh, policies)
            reference, cached = reference_losses(
                policies.reference, domains, tokenizer, signals.rows, sweeper, data, mesh
            )
            sampler, loader = Sampler(config.seed, data.batch_size, data.draw), Loader(pool, mesh, cached)
            groups = pool.groups(by_domain=policies.by_domain)
            sequences = Sequences(groups, config.seed)
            selection = None
            if policies.selecting or policies.ordering:
                choosers = (policies.selecting, policies.ordering)
                selection = Selection(
                    *choosers, pool, groups, sampler, sequences, signals.of, config.train_step, run_folder
                )
                if latest is not None:
                    selection.restore(checkpoints.read_selection(latest))
            rows_a_batch = data.batch_size // data.grad_accumulation
            gradients = functools.partial(signals.domain_gradients, learning_rate=learning_rate, rows=rows_a_batch)
            updates = Updates(policies, selection, signals.of, gradients)
            step = TrainStep(
                graphdef,
                optimizer,
                learning_rate,
                policies.mixer,
                policies.schedule,
                weighters=policies.weighters,
                reference_graphdef=reference and reference.graphdef,
                grad_accumulation=data.grad_accumulation,
                weigh_microbatches=data.weigh_over == "microbatch",
            )
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
            fixed = Fixed(frozen, reference and reference.params)
            evaluate = make_evaluate(graphdef, domains, rows_a_batch, config.eval_rows, mesh)
            job = Job(
                step=functools.partial(jitted, fixed=fixed),
                evaluate=lambda params: evaluate(lora.combine(frozen, params)),
                between=updates.between,
                selection=selection,
                stop_requested=stop_requested,
                sampler=sampler,
                sequences=sequences,
                loader=loader,
                pool=pool,
                domains=domains,
                mixer=config.mixer.name if config.mixer else None,
                average=policies.mixer.average,
                policies=any(config[kind] for kind in registry.KINDS),
                schedule=policies.schedule,
                lag=data.lag,
                cadence=Cadence(config.train_step, config.log_every, config.eval_every, config.checkpoint_every),
                identity=identity,
                checkpoints=checkpoints,
                flops_per_token=model.flops_per_token(max(pool.buckets)),
                peak_flops=total_peak_flops(),
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
            )
            yield job, state, position


def saved_tokenizer(tokenizer: Tokenizer, source: str, run_folder: Path, *, new: bool) -> str:
    """Where to read the tokenizer from again: where it came from, or the run folder if the run trained it.

    Args:
        tokenizer: of the run.
        source: `config.data.tokenizer`.
        run_folder: it is saved there.
        new: whether it is to be saved.
    """
    if new and jax.process_index() == 0:
        tokenizer.save(run_folder / "tokenizer")
    multihost_utils.sync_global_devices("the tokenizer is saved")
    return str(run_folder / "tokenizer") if source.startswith("train:") else source


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
