"""How good scores of training examples are, by the losses of models trained on subsets (LDS).

    python -m dataflex_jax.validate --config=configs/less.py --scores=selected.npz
        [--scores=other.npy ...] --output=DIR [--subsets=32] [--alpha=0.5] [--seeds=1]

Draws random subsets of the candidates, trains the recipe's model on each, all as one program,
and measures the loss of each target group. The linear datamodeling score of a file is how well the
sums of its scores over the subsets rank these losses (Spearman), with a bootstrap interval; random
scores come beside. Files are the .npz of `select`, an .npy [N] or [N, groups], or a .csv with
columns by group. Writes lds.json, lds.png and subsets.npz into DIR. The same command again goes
on where it was stopped; with other --scores, or more --subsets, it trains only what is missing.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded
from dataflex_jax.validation import results
from dataflex_jax.validation.scores import ACCEPTED
from dataflex_jax.validation.study import Design, validate

_FEWEST = 8  # of which a rank correlation says something


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "The recipe whose model, data and targets to use.")
    flags.DEFINE_multi_string("scores", [], f"A file of scores: {ACCEPTED}; may be given several times.")
    flags.DEFINE_integer("subsets", 32, "How many subsets.")
    flags.DEFINE_float("alpha", 0.5, "The share of the candidates in each.")
    flags.DEFINE_integer("seeds", 1, "Models on each subset, whose losses are averaged.", lower_bound=1)
    flags.DEFINE_integer("at_once", None, "Models in one program; by default as many as fit.", lower_bound=1)
    cli.define_path("output", None, "A folder.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options, config = flags.FLAGS, cli.chosen_config(example="configs/less.py")
    if not options.scores:
        raise InputError(f"--scores is missing: {ACCEPTED}")
    if options.output is None:
        raise InputError("--output is missing: a folder")
    if options.subsets < _FEWEST:
        reason = f"too few for a correlation; {_FEWEST} or more are needed, and 30 for one to rely on"
        raise InputError(reason, option="--subsets", value=options.subsets)
    if jax.config.jax_compilation_cache_dir is None:
        # So that a restart compiles nothing.
        jax.config.update("jax_compilation_cache_dir", str(Path(expanded(config.data.cache_dir)) / "compilations"))
    design = Design(options.subsets, options.alpha, options.seeds, options.at_once)
    folder, files = Path(options.output), [Path(expanded(path)) for path in options.scores]
    found = validate(config, files, design, folder)
    if found is None:
        print("Stopped on request, saved; the same command goes on from there.")
        return
    results.write(folder, found, design)
    print(results.table(found))
    print(f"{found.losses.shape[0]} subsets. Written to {folder / 'lds.json'}, lds.png and subsets.npz.")


if __name__ == "__main__":
    cli.run(main, define_flags)
