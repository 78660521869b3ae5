"""Whether a run fits, and how fast it can be at most: compiles its programs for a mesh of any size, and runs none.

    python scripts/bench/memory.py --config=configs/odm.py:slimpajama-6b --device=h100 --devices=8 [--shape=DIR] \\
        [--program=gradients] [--config.mesh.tensor=2 --config.model.remat=dots ...] [--sweep]

With --device XLA's GPU compiler compiles for that card, which need not be here (the extra "aot"). It finds the bytes of
each device against the card's memory, FLOPs and memory traffic, the roofline time, which these take at the card's
peaks, the MFU that this allows, and the collectives with what of them has nothing to hide behind. It does not know
cuDNN's workspace and NCCL's buffers, some hundred MB.

Without --device the program is for the devices that are here, CPUs where there is no accelerator: parameters, optimizer
state and batch are exact all the same, the temporaries of a CPU are an upper bound of a GPU's.

--sweep tries variants, of remat, rows and mesh if --over names nothing else, and says which of those that fit has the
most tokens a second. An axis of --over is a field of the configuration, "devices", "shape", or "rows" (a microbatch's,
a device):

    ... --device=h100 --sweep --over=shape=DIR,DIR --over=devices=1,8,32 --over=rows=4,8 --over=model.remat=full,dots

--program is one of dataflex_jax/aot/programs.py: train (with adapters where the configuration has them), losses, norms,
gradients, kronecker, rademacher, influences, alignments, generate. Instruction data is counted at its longest rows.
--shape takes the model's shape from a folder, so that no hub is needed. No data is read.
"""

import ast
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import results
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax.aot import compiler, grid, words
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.aot.estimate import Estimate, estimate
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded
from dataflex_jax.training import run_config

OVER = ("model.remat=full,attention,dots,none", "rows=4,8,16", "mesh.tensor=1,2")


def estimated(config: ConfigDict, fields: Mapping[str, Any]) -> Estimate:
    """The estimate of the configuration with other values of fields, "devices", "shape" and "rows"."""
    fields = {"devices": flags.FLAGS.devices, "shape": flags.FLAGS.shape, "rows": None} | fields
    devices, shape, rows = (fields.pop(name) for name in ("devices", "shape", "rows"))
    if shape:
        fields["model.name_or_path"] = expanded(shape)
    config = grid.having(config, fields)
    if rows:
        config.data.batch_size = rows * max(1, devices // config.mesh.tensor) * config.data.grad_accumulation
    card = CARDS[flags.FLAGS.device] if flags.FLAGS.device else None
    return estimate(flags.FLAGS.program, config, card, devices, flags.FLAGS.vocab_size)


def axes(texts: list[str]) -> dict[str, list[Any]]:
    """The axes of --over.

    Raises:
        InputError: a text that is no NAME=VALUE,...
    """
    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not name or not values:
            raise InputError(f"--over={text}: must be NAME=VALUE,VALUE,...")
        found[name] = [_value(value) for value in values.split(",")]
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def sweep(config: ConfigDict) -> dict[str, Any]:
    """Tries the variants, prints them and what is best of each model and number of devices; the result as JSON."""
    over = axes(flags.FLAGS.over)
    rows = grid.tried(lambda fields: estimated(config, fields), list(grid.variants(over)))
    print(words.table(rows))
    chosen = grid.best_of_each(rows, ("shape", "devices"))
    for row in chosen:
        print("best:", ", ".join(f"{name}={value}" for name, value in row.to_json()["fields"].items()))
    if not chosen:
        print("none fits")
    found = {"program": flags.FLAGS.program, "card": flags.FLAGS.device, "cards": flags.FLAGS.devices}
    return found | {"rows": [row.to_json() for row in rows], "best": [rows.index(row) for row in chosen]}


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    if flags.FLAGS.device:
        jax.config.update("jax_platforms", "cpu")  # the card is not here, and JAX must not look for it
    config = cli.chosen_config()
    if flags.FLAGS.sweep and not flags.FLAGS.device:
        raise InputError(f"--sweep needs --device, one of {', '.join(flags.FLAGS['device'].parser.enum_values)}")
    if flags.FLAGS.device:
        compiler.check(f"--device={flags.FLAGS.device}")
    else:
        # Before JAX starts: where there is no accelerator, the mesh is made of virtual CPU devices.
        count = f"--xla_force_host_platform_device_count={flags.FLAGS.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    if flags.FLAGS.sweep:
        found = sweep(config)
        if flags.FLAGS.output:
            results.write(flags.FLAGS.output, results.describe(run_config.resolved(config)) | found)
        return
    found = estimated(config, {})
    print(words.described(found))
    if flags.FLAGS.output:
        with open(flags.FLAGS.output, "w") as file:
            json.dump(found.to_json(), file, indent=1)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The recipe.")
    flags.DEFINE_enum("device", None, list(CARDS), "The card to compile for; None: for what is here.")
    flags.DEFINE_integer("devices", 8, "How many devices the mesh has, of those that are not here.", lower_bound=1)
    flags.DEFINE_string("program", "train", "What is compiled: train, gradients, generate, ...")
    flags.DEFINE_boolean("sweep", False, "Try the variants of --over.")
    flags.DEFINE_multi_string("over", OVER, "An axis of the sweep: NAME=VALUE,VALUE,... Several are multiplied.")
    cli.define_path("shape", None, "A folder with config.json in place of config.model.name_or_path.")
    flags.DEFINE_integer("vocab_size", 2, "The tokenizer's, where the model's shape does not say.", lower_bound=2)
    cli.define_path("output", None, "A JSON file for the figures.")
    cli.run(main)
