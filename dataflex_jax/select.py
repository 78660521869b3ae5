"""Scores and selects training examples with checkpoints, without training.

    python -m dataflex_jax.select --config=configs/less.py --checkpoint=RUN_DIR
        --output=selected.npz [--num=1000] [--records=selected.jsonl] [--group_scores]

The configuration says the selector, the candidates (data) and the target set (targets);
--checkpoint is a run folder (its newest step), one step's folder, or a Hugging Face folder or
hub id. Several, with commas between, are LESS's sum over checkpoints, weighted by
--checkpoint_weights or else by their learning rates; other selectors take the last one. dsir needs
none, nor do near, tsds and rds with selector.embedding_model or embeddings of your own. The file
has ids and scores (the best first), their domains, the numbers of their records, and all_scores;
with --group_scores also those for each target group (less, icons), for dataflex_jax.validate.
--records writes the chosen records themselves, JSONL or Parquet, for configs/sft.py to train on:
as they are, or, of datasets in several formats, as messages (data.formatting=openai).
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.selection.choosing import write_selection
from dataflex_jax.selection.records import check_path, chosen_records, have_one_format, write_records
from dataflex_jax.training.locate import CHECKPOINTS
from dataflex_jax.training.selecting import select


def _numbers(values: Sequence[str], count: int) -> list[float] | None:
    if not values:
        return None
    try:
        weights = [float(value) for value in values]
    except ValueError as error:
        raise InputError(f"--checkpoint_weights={','.join(values)}: must be numbers") from error
    if len(weights) != count:
        raise InputError(f"--checkpoint_weights={','.join(values)}: one for each of the {count} checkpoints is needed")
    return weights


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "The recipe whose selector, data and targets to use.")
    cli.define_paths("checkpoint", f"The model: {CHECKPOINTS}; several with commas between.")
    flags.DEFINE_list("checkpoint_weights", [], "Their weights; by default their learning rates.")
    cli.define_path("output", None, "An .npz file.")
    help_of_num = "How many examples; by default config.selector.keep of the pool, or 5 %."
    flags.DEFINE_integer("num", None, help_of_num, lower_bound=1)
    flags.DEFINE_boolean("group_scores", False, "Whether to write scores by target group too.")
    cli.define_path("records", None, "A .jsonl or .parquet file for the chosen records.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options, config = flags.FLAGS, cli.chosen_config(example="configs/less.py")
    if options.output is None or not options.output.endswith(".npz"):
        raise InputError(f"--output={options.output}: must be a file that ends in .npz")
    output, records = Path(options.output), options.records and Path(options.records)
    if records:
        check_path(records)
    weights = _numbers(options.checkpoint_weights, len(options.checkpoint))
    wanted = {"records": records is not None, "by_group": options.group_scores}
    pool, chosen = select(config, options.checkpoint, weights, options.num, **wanted)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_selection(output, pool, chosen, all_scores=True)
    print(
        f"{len(chosen.ids)} of {pool.num_rows} examples, scores {chosen.scores.max():.4g} to "
        f"{chosen.scores.min():.4g}; {chosen.not_finite} were not finite. Written to {output}."
    )
    if records:
        write_records(records, chosen_records(pool, chosen.ids))
        form = "" if have_one_format(pool) else ", as messages (data.formatting=openai), for their formats differ"
        print(f"Their records are in {records}{form}.")


if __name__ == "__main__":
    cli.run(main, define_flags)
