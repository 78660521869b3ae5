"""Trains a language model while policies decide what it trains on.

    python -m dataflex_jax.train --config=configs/odm.py[:variant] [--workdir=DIR]
        [--config.field=value ...]

configs/base.py explains the fields. The same command again goes on from the newest checkpoint in
the run folder. Several hosts: start it on each one under SLURM (srun) or Open MPI (mpirun), or give
--coordinator, --num_processes and --process_id.
"""

import os
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from dataflex_jax import cli
from dataflex_jax.files import expanded
from dataflex_jax.training.setup import train_and_evaluate


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/odm.py:slimpajama-6b.")
    cli.define_path("workdir", None, "The run folder; by default runs/RECIPE[-VARIANT].")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster manager tells it.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is.")
    flags.DEFINE_integer("start_timeout", 40, "Seconds to wait for the others at the start.", lower_bound=1)


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options, config = flags.FLAGS, cli.chosen_config()
    run_folder = Path(options.workdir or cli.default_run_folder())
    cli.initialize_distributed(options.coordinator, options.num_processes, options.process_id, options.start_timeout)
    if jax.config.jax_compilation_cache_dir is None:
        # So that a restart compiles nothing.
        jax.config.update("jax_compilation_cache_dir", str(Path(expanded(config.data.cache_dir)) / "compilations"))
    outcome = train_and_evaluate(config, run_folder)
    if outcome.preempted and outcome.step == 0:
        print("Stopped on request before the first step; the same command begins anew.")
    elif outcome.preempted:
        print(f"Stopped on request after step {outcome.step}, saved; the same command goes on from there.")
        print(f"What it was until then: python -m dataflex_jax.report {run_folder} --output=report.html")
    elif not os.access(run_folder, os.W_OK):
        print(f"Nothing to do: all {outcome.step} steps are done, in a folder that cannot be written: {run_folder}")
    elif jax.process_index() == 0:
        # Not before: only a finished run needs matplotlib and scipy, a third of all that there is to import.
        from dataflex_jax.reporting.summary import write_results

        write_results(
            run_folder,
            steps=outcome.step,
            tokens_seen=outcome.tokens_seen,
            tokens_per_second=outcome.tokens_per_second,
            mfu=outcome.mfu,
        )


if __name__ == "__main__":
    cli.run(main, define_flags)
