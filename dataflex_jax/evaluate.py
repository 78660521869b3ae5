"""Held-out loss of a checkpoint by domain, and what else `config.evaluators` names; or benchmarks.

    python -m dataflex_jax.evaluate --checkpoint=MODEL
        [--config=configs/odm.py:local --config.data.root=DIR ...]
    python -m dataflex_jax.evaluate --checkpoint=MODEL --tasks=mmlu,arc_challenge
        [--num_fewshot=5] [--limit=100] [--mmlu_root=DIR] [--include_path=DIR]

--checkpoint is a run folder (its newest step), one step's folder, or a Hugging Face folder or
hub id. Without --config the data are those of the run; with it, the recipe's, in the model's
tokens and with its evaluators. Prints a table an evaluator, and writes --output, by default in
the run folder: evaluation.json, or, with --config, evaluation-RECIPE.json.

With --tasks it is any tasks of lm-evaluation-harness (`pip install 'dataflex_jax[eval]'`), and the
output, by default evaluation-tasks.json in the run folder, has the harness's format. Their data
come from the Hugging Face hub; --mmlu_root is a folder with MMLU's own files, dev/*_dev.csv and
test/*_test.csv or val/*_val.csv, --include_path one with tasks of your own as YAML files. Of
multiple choices bits_per_byte is measured too: what the model needs for the right answers.
--config then only says how a Hugging Face checkpoint is computed, and on which mesh.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax import config as configuration
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.loader import check_rows
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded, file_name, replace_json, to_jsonable, unwritable
from dataflex_jax.harness import results, tasks
from dataflex_jax.reporting.evaluations import HELD_OUT
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import run_config
from dataflex_jax.training.evaluation import Evaluation, EvaluationContext, evaluators, held_out
from dataflex_jax.training.fits import check_vocabulary
from dataflex_jax.training.locate import CHECKPOINTS, RunStep, locate, use_tokenizer_of
from dataflex_jax.training.weights import How, Opened, open_model

logger = logging.getLogger("dataflex_jax.evaluate")

# The flags beside --tasks.
_OF_TASKS = ("num_fewshot", "limit", "include_path", "mmlu_root", "apply_chat_template")


def evaluate(opened: Opened, config: ConfigDict) -> list[Evaluation]:
    """What the evaluators of `config` measure, as in eval.jsonl; where it names none, the held-out loss.

    Args:
        opened: whose model; its parameters are on the mesh of `config`.
        config: whose data, evaluators and eval_rows to use, in the model's tokens.

    Raises:
        InputError: data that cannot be read, a mesh that does not fit the devices, or an unknown evaluator.
    """
    with jax.set_mesh(opened.mesh):
        domains, tokenizer = open_domains(config.data)
        check_vocabulary(opened.source, tokenizer)
        context = EvaluationContext(config, domains, tokenizer, opened.mesh)
        return [evaluator.run(opened.model) for evaluator in evaluators(context) or (held_out(context),)]


def table(record: Evaluation) -> str:
    """The record as aligned text."""
    if record["split"] != HELD_OUT:
        return _table_of_any(record)
    lines = [f"{'domain':16} {'nll':>8} {'perplexity':>11} {'bits/byte':>10} {'tokens':>10}"]
    for name, figures in _groups(record).items():
        nll, perplexity, bits, tokens = (figures[k] for k in ("nll", "perplexity", "bits_per_byte", "tokens"))
        lines.append(f"{name:16} {nll:8.4f} {perplexity:11.3f} {bits:10.4f} {tokens:10d}")
    return "\n".join(lines)


def _table_of_any(record: Evaluation) -> str:
    groups = _groups(to_jsonable(record))
    widths = {metric: max(len(metric), 10) for figures in groups.values() for metric in figures}
    lines = [" ".join([f"{'':16}", *(f"{metric:>{width}}" for metric, width in widths.items())])]
    for name, figures in groups.items():
        cells = (f"{_number(figures.get(metric)):>{width}}" for metric, width in widths.items())
        lines.append(" ".join([f"{name:16}", *cells]))
    return "\n".join(lines)


def _groups(record: Evaluation) -> dict[str, dict[str, Any]]:
    """The figures of each domain and overall, those that there are."""
    return record["domains"] | ({"overall": record["overall"]} if record["overall"] else {})


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_written(records: Sequence[Evaluation]) -> dict[str, Any]:
    """The held-out record, and beside its fields, where there are others, these."""
    by_split = {record["split"]: record for record in records}
    held_out_record = by_split.pop(HELD_OUT, {})
    return held_out_record | ({"evaluators": by_split} if by_split else {})


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "A recipe whose data to use; by default the run's.")
    cli.define_path("checkpoint", None, f"The model: {CHECKPOINTS}.")
    default = "evaluation.json, or, with --config, evaluation-RECIPE.json, in the run folder"
    cli.define_path("output", None, f"The file to write; by default {default}.")
    flags.DEFINE_list("tasks", [], "Tasks, groups and tags of lm-evaluation-harness, in place of the held-out loss.")
    flags.DEFINE_integer("num_fewshot", None, "Examples before each question; by default as the task says.", 0)
    flags.DEFINE_float("limit", None, "The first so many questions of each task; below 1, that share of them.", 0)
    flags.DEFINE_bool("apply_chat_template", False, "Ask in the tokenizer's chat template.")
    cli.define_path("include_path", None, "A folder with further tasks as YAML files.")
    cli.define_path("mmlu_root", None, "A folder with MMLU's csv files, in place of the hub's data set.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if options.checkpoint is None:
        raise InputError(f"--checkpoint is missing: {CHECKPOINTS}")
    run = locate(options.checkpoint)
    if options.tasks:
        _ask_tasks(run)
        return
    if without := [f"--{name}" for name in _OF_TASKS if options[name].present]:
        raise InputError(f"{without[0]} is for --tasks, which is missing; name the tasks of lm-evaluation-harness")
    if run is None and not options["config"].present:
        raise InputError("--config is missing: a Hugging Face checkpoint has no data of its own; name a recipe's")
    recipe = cli.recipe_name() if options["config"].present else None
    config = run_config.read(run.folder) if recipe is None else cli.chosen_config()
    output = _output(run, options.output, recipe)
    use_tokenizer_of(config.data, options.checkpoint)
    configuration.validate(config)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size // config.data.grad_accumulation, 1)
    records = evaluate(open_model(options.checkpoint, mesh, how=How.of(config)), config)
    if [(record["split"], record["domains"]) for record in records] == [(HELD_OUT, {})]:
        raise InputError("no domain has held-out text: raise config.data.valid_fraction, or add NAME.valid.jsonl files")
    named = _named(run)
    for record in records:
        print(f"{named}, {'held out' if record['split'] == HELD_OUT else record['split']}:\n{table(record)}")
    if output is not None:
        written = to_jsonable({**({"step": run.step} if run else {}), **_as_written(records)})
        replace_json(output, written, indent=2, ensure_ascii=False)
        print(f"Written to {output}.")


def _ask_tasks(run: RunStep | None) -> None:
    options = flags.FLAGS
    settings = tasks.Settings(tuple(options.tasks), **{name: options[name].value for name in _OF_TASKS})
    if settings.limit is not None and settings.limit <= 0:
        raise settings.refused("limit", "must be a number > 0")
    tasks.check(settings)
    output = _output(run, options.output, "tasks")
    how = mesh = None
    if options["config"].present:
        config = cli.chosen_config()
        configuration.validate(config, data_is_read=False)
        how, mesh = How.of(config), make_mesh(config.mesh)
    opened = open_model(options.checkpoint, mesh, how=how)
    opened_tasks = tasks.Tasks(settings, opened.tokenizer, opened.mesh)
    found = []
    for name in settings.tasks:
        found.append(opened_tasks.results(name, opened.model))
        print(f"{_named(run)}, {name}:\n{results.table(results.evaluation(name, found[-1]))}")
    if output is not None:
        written = {**({"step": run.step} if run else {}), "model": options.checkpoint, **results.merged(found)}
        replace_json(output, written, indent=2, ensure_ascii=False, default=str)
        print(f"Written to {output}.")


def _named(run: RunStep | None) -> str:
    return f"Step {run.step} of {run.folder}" if run else flags.FLAGS.checkpoint


def _output(run: RunStep | None, output: str | None, recipe: str | None) -> Path | None:
    """The file to write; None: there is none, as nothing is asked for and the run folder cannot be written.

    Args:
        run: what is evaluated, if it is a run's.
        output: what was asked for.
        recipe: the name of the recipe whose data it is evaluated on; None: on its own.

    Raises:
        InputError: a file is asked for that cannot be written.
    """
    if output is not None:
        path = Path(expanded(output))
        if fault := unwritable(path):
            raise InputError(f"cannot be written ({fault}); choose another file", option="--output", value=output)
        return path
    if run is None:
        return None
    path = run.folder / ("evaluation.json" if recipe is None else f"evaluation-{file_name(recipe)}.json")
    if fault := unwritable(path):
        logger.warning("%s will not be written: %s; --output=FILE writes another.", path, fault)
        return None
    return path


if __name__ == "__main__":
    cli.run(main, define_flags)
