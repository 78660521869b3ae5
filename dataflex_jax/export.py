"""Checkpoints to and from Hugging Face's format.

    python -m dataflex_jax.export --checkpoint=MODEL --output=HF_DIR
        [--dtype=bfloat16 | --adapter]
    python -m dataflex_jax.export --import_from=HF_DIR_OR_HUB_ID --output=RUN_DIR
        [--config=RECIPE[:variant] ...]

--checkpoint is a run folder (its newest step), one step's folder, or a Hugging Face or PEFT
folder or hub id; the output then holds config.json, safetensors, the tokenizer and
generation_config.json, which says where a response ends, as `transformers` and other tools read
them. --import_from makes a run folder with the checkpoint of step 0, prepared for a recipe, by
default configs/base.py. To train on from it:

    python -m dataflex_jax.train --config=RECIPE[:variant] --workdir=RUN_DIR
        --config.model.from_scratch=False --config.model.name_or_path=HF_DIR_OR_HUB_ID

Of a LoRA run the model is exported with the adapters merged into it, or, with --adapter, the
adapters alone in PEFT's format. --import_from takes such a folder too: its base is
--config.model.name_or_path, or the one it names, and the recipe trains on with the --config.lora
fields that the new run's config.json has.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.training.exporting import export_adapter, export_checkpoint
from dataflex_jax.training.imports import import_pretrained
from dataflex_jax.training.locate import CHECKPOINTS


def define_flags() -> None:
    """The command's flags."""
    cli.define_path("checkpoint", None, f"What to export: {CHECKPOINTS}.")
    cli.define_path("import_from", None, "What to import: a Hugging Face folder or hub id.")
    cli.define_path("output", None, "The folder to write: Hugging Face's of an export, a run's of an import.")
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of an export's tensors; default: the checkpoint's.")
    flags.DEFINE_bool("adapter", False, "Export LoRA adapters in PEFT's format, without their base.")
    config_flags.DEFINE_config_file("config", None, "The recipe of an import; default: configs/base.py.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if (options.checkpoint is None) == (options.import_from is None):
        raise InputError("give one of --checkpoint=MODEL (export) and --import_from=HF_DIR_OR_HUB_ID (import)")
    if options.output is None:
        raise InputError("--output is missing: the folder to write")
    output = Path(options.output)
    if options.checkpoint is not None:
        if options["config"].present:
            raise InputError("--config is for --import_from; with --checkpoint the checkpoint says what the model is")
        if options.adapter and options.dtype is not None:
            raise InputError("--dtype is for whole models; adapters keep the dtype that they were trained in")
        if options.adapter:
            opened = export_adapter(options.checkpoint, output)
        else:
            opened = export_checkpoint(options.checkpoint, output, options.dtype)
        kind = "PEFT adapter" if options.adapter else "Hugging Face checkpoint"
        named = f"Step {opened.run.step} of {opened.run.folder}" if opened.run else opened.source
        print(f"{named} is now a {kind} in {output}.")
    else:
        if options.adapter:
            raise InputError("--adapter is for --checkpoint; --import_from finds out what a folder holds")
        if options.dtype is not None:
            raise InputError("--dtype is for --checkpoint; the parameters of a run have --config.model.param_dtype")
        import_pretrained(options.import_from, cli.chosen_config(default="configs/base.py"), output)
        print(f"{options.import_from} is now step 0 of {output}.")


if __name__ == "__main__":
    cli.run(main, define_flags)
