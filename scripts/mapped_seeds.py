"""All seeds of a recipe as one program; what scripts/compare.py --mapped runs for each recipe.

    python scripts/mapped_seeds.py --config=RECIPE --seeds=0,1,2 --workdir=RECIPE_DIR/mapped [--config.field=value ...]

Each seed's model is the one that `train` makes of it. What is known of all of them is in the work folder, which the
same command goes on in; beside it, in seedN, is what the report compares: config.json, eval.jsonl with the held-out
losses after the last step, and summary.json.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags
from compare import list_of_seeds
from jaxtyping import Float64
from ml_collections import config_flags

from dataflex_jax import cli
from dataflex_jax.data.targets import TargetSet, held_out
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded, replace_file, to_json
from dataflex_jax.mapped.measuring import tokens_in_loss
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.models import Shared, opened, train_and_measure
from dataflex_jax.reporting.run_folder import write_summary
from dataflex_jax.training import run_config
from dataflex_jax.training.evaluation import held_out_record


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "The recipe.")
    flags.DEFINE_string("seeds", "3", "How many seeds, from 0 on; or which, as in 0,3,5.")
    cli.define_path("workdir", None, "A folder; the seeds' are beside it.")


def write_seed(folder: Path, seed: int, shared: Shared, targets: TargetSet, losses: Float64[np.ndarray, " K"]) -> None:
    """Writes a seed's folder as a run of its own would have it, as far as the report compares it."""
    config = shared.experiment.config.copy_and_resolve_references()
    config.seed = seed
    tokens = tokens_in_loss(targets)
    record = held_out_record(shared.experiment.inputs.domains, losses * tokens, tokens)
    folder.mkdir(parents=True, exist_ok=True)
    run_config.write(config, folder / "config.json")
    replace_file(folder / "eval.jsonl", (to_json({"step": config.train_step, **record}) + "\n").encode())
    figures = {"overall": record["overall"], "domains": record["domains"]}
    write_summary(folder, {"steps": config.train_step, "held_out": figures})


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options, config = flags.FLAGS, cli.chosen_config()
    if options.workdir is None:
        raise InputError("--workdir is missing: a folder")
    folder, seeds = Path(options.workdir), list_of_seeds(options.seeds)
    config.seed = seeds[0]
    if jax.config.jax_compilation_cache_dir is None:
        # So that a restart compiles nothing.
        jax.config.update("jax_compilation_cache_dir", str(Path(expanded(config.data.cache_dir)) / "compilations"))
    with opened(config, folder) as shared:
        targets = held_out(shared.experiment.inputs.domains, config.eval_rows)
        losses = train_and_measure(shared, [Member(f"seed {seed}", seed) for seed in seeds], [targets])
        if losses is None:
            print("Stopped on request, saved; the same command goes on from there.")
            return
        for seed, of_seed in zip(seeds, losses, strict=True):
            write_seed(folder.with_name(f"seed{seed}"), seed, shared, targets, of_seed)
    write_summary(folder, {"seeds": seeds})


if __name__ == "__main__":
    cli.run(main, define_flags)
