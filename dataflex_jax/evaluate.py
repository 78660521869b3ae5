"""Held-out loss of a checkpoint, per domain.

    python -m dataflex_jax.evaluate --checkpoint=MODEL
        [--config=configs/odm.py:local --config.data.root=DIR ...]

--checkpoint is a run folder (its newest step), one step's folder, or a Hugging Face folder or
hub id. Without --config the data are those of the run; with it, the recipe's, in the model's
tokens. Prints a table, and writes evaluation.json into the run folder.
"""

from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax import config as configuration
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.loader import check_rows
from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_file, to_json
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import run_config
from dataflex_jax.training.evaluation import EvaluationContext, held_out
from dataflex_jax.training.locate import CHECKPOINTS, locate, tokenizer_of
from dataflex_jax.training.weights import How, Opened, open_model


def evaluate(opened: Opened, config: ConfigDict) -> dict[str, Any]:
    """Held-out losses as in eval.jsonl.

    Args:
        opened: whose model; its parameters are on the mesh of `config`.
        config: whose data and eval_rows to use, in the model's tokens.

    Raises:
        InputError: data that cannot be read, or a mesh that does not fit the devices.
    """
    with jax.set_mesh(opened.mesh):
        domains, tokenizer = open_domains(config.data)
        return held_out(EvaluationContext(config, domains, tokenizer, opened.mesh)).run(opened.model)


def table(record: dict[str, Any]) -> str:
    """The record as aligned text."""
    lines = [f"{'domain':16} {'nll':>8} {'perplexity':>11} {'bits/byte':>10} {'tokens':>10}"]
    for name, figures in {**record["domains"], "overall": record["overall"]}.items():
        nll, perplexity, bits, tokens = (figures[k] for k in ("nll", "perplexity", "bits_per_byte", "tokens"))
        lines.append(f"{name:16} {nll:8.4f} {perplexity:11.3f} {bits:10.4f} {tokens:10d}")
    return "\n".join(lines)


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "A recipe whose data to use; by default the run's.")
    flags.DEFINE_string("checkpoint", None, f"The model: {CHECKPOINTS}.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if options.checkpoint is None:
        raise InputError(f"--checkpoint is missing: {CHECKPOINTS}")
    run = locate(options.checkpoint)
    if run is None and not options["config"].present:
        raise InputError("--config is missing: a Hugging Face checkpoint has no data of its own; name a recipe's")
    config = cli.chosen_config() if options["config"].present else run_config.read(run.folder)
    config.data.tokenizer = tokenizer_of(options.checkpoint)
    configuration.validate(config)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size // config.data.grad_accumulation, 1)
    record = evaluate(open_model(options.checkpoint, mesh, how=How.of(config)), config)
    if not record["domains"]:
        raise InputError("no domain has held-out text: raise config.data.valid_fraction, or add NAME.valid.jsonl files")
    named = f"Step {run.step} of {run.folder}" if run else options.checkpoint
    print(f"{named}, held out:\n{table(record)}")
    if run is not None:
        path = run.folder / "evaluation.json"
        replace_file(path, (to_json({"step": run.step, **record}, indent=2) + "\n").encode())
        print(f"Written to {path}.")


if __name__ == "__main__":
    cli.run(main, define_flags)
