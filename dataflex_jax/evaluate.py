"""Held-out loss of a checkpoint, per domain.

    python -m dataflex_jax.evaluate --checkpoint=RUN_DIR
        [--config=configs/odm.py:local --config.data.root=DIR ...]

--checkpoint is a run folder (its newest step) or one step's folder. Without --config the data are
those of the run; with it, the recipe's, in the run's tokens. Prints a table and writes
evaluation.json into the run folder.
"""

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
from dataflex_jax.files import to_json
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training.checkpoint import Checkpoints, locate
from dataflex_jax.training.evaluation import make_evaluate
from dataflex_jax.training.weights import read_checkpoint


def evaluate_checkpoint(trained: ConfigDict, config: ConfigDict, run_folder: Path, step: int) -> dict[str, Any]:
    """A record as in eval.jsonl.

    Args:
        trained: the run's own configuration, which says what the model is.
        config: the configuration whose data, mesh and eval_rows to use.
        run_folder: of the checkpoint.
        step: of the checkpoint.

    Raises:
        InputError: data that cannot be read, or a mesh that does not fit the devices.
    """
    mesh = make_mesh(config.mesh)
    rows = config.data.batch_size // config.data.grad_accumulation
    check_rows(mesh, rows, 1)
    with jax.set_mesh(mesh):
        domains, _ = open_domains(config.data)
        _, graphdef, params = read_checkpoint(Checkpoints(run_folder, writable=False), step, trained, mesh)
        evaluate = make_evaluate(graphdef, domains, rows, config.eval_rows, mesh)
        return {"step": step, **evaluate(params)}


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
    flags.DEFINE_string("checkpoint", None, "A run folder, or the folder of one step in it.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if options.checkpoint is None:
        raise InputError("--checkpoint is missing: a run folder, or the folder of one step in it")
    run_folder, step = locate(options.checkpoint)
    trained = configuration.read(run_folder)
    config = trained
    if options["config"].present:
        config = cli.chosen_config()
        config.data.tokenizer = str(run_folder / "tokenizer")
    configuration.validate(config)
    record = evaluate_checkpoint(trained, config, run_folder, step)
    if not record["domains"]:
        raise InputError("no domain has held-out text: raise config.data.valid_fraction, or add NAME.valid.jsonl files")
    path = run_folder / "evaluation.json"
    path.write_text(to_json(record, indent=2) + "\n")
    print(f"Step {step} of {run_folder}, held out:\n{table(record)}\nWritten to {path}.")


if __name__ == "__main__":
    cli.run(main, define_flags)
