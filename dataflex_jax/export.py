"""Checkpoints to and from Hugging Face's format.

    python -m dataflex_jax.export --checkpoint=RUN_DIR --output=HF_DIR
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
        --config.data.tokenizer=HF_DIR_OR_HUB_ID

Of a LoRA run the model is exported with the adapters merged into it, or, with --adapter, the
adapters alone in PEFT's format. --import_from takes such a folder too: its base is
--config.model.name_or_path, or the one it names, and the recipe trains on with the --config.lora
fields that the new run's config.json has.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import transformers
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli
from dataflex_jax.errors import InputError
from dataflex_jax.models import parts
from dataflex_jax.models.hf import peft, weights
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.imports import imported
from dataflex_jax.training.locate import CHECKPOINTS
from dataflex_jax.training.weights import RANDOM, Opened, adapter_and_base, open_model

logger = logging.getLogger(__name__)


def export_checkpoint(source: str | Path, output: Path, dtype: str | None = None) -> Opened:
    """Writes a model as a Hugging Face folder, with adapters merged into their base.

    Args:
        source: a run folder, one step's folder, or a Hugging Face folder or hub id.
        output: a new or empty folder.
        dtype: of the tensors, "float32" or "bfloat16"; None: that of the checkpoint.

    Raises:
        InputError: a checkpoint that cannot be read, or an output folder in use.
        TrainingError: the files cannot be written.
    """
    opened = open_model(source)
    with jax.set_mesh(opened.mesh):
        model = opened.model.without_adapters(dtype or opened.model.config.param_dtype)
        with _tokenizer_folder(opened) as tokenizer:
            weights.save_pretrained(output, model.config, model.whole(), tokenizer, dtype=dtype)
    if jax.process_index() == 0:
        _warn_of_other_rules(output)
    return opened


@contextlib.contextmanager
def _tokenizer_folder(opened: Opened) -> Iterator[Path]:
    """A folder with nothing but the tokenizer's files."""
    if opened.run is not None:
        yield Path(opened.tokenizer_source)
        return
    with tempfile.TemporaryDirectory() as folder:
        opened.tokenizer.save(folder)
        yield Path(folder)


def _warn_of_other_rules(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    chosen = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = json.loads(chosen.backend_tokenizer.to_str())
    if any(rules[part] != theirs[part] for part in ("normalizer", "pre_tokenizer")):
        logger.warning(
            "This tokenizer is not of the model's family, and AutoTokenizer of transformers %s would split text by the "
            "rules of %s; load it with transformers.PreTrainedTokenizerFast.from_pretrained(%r).",
            transformers.__version__,
            type(chosen).__name__,
            str(folder),
        )


def export_adapter(source: str | Path, output: Path) -> Opened:
    """Writes the adapters of a checkpoint as a PEFT folder. Of a run, the base itself is not read.

    Args:
        source: a run folder, one step's folder, or a PEFT folder or hub id.
        output: a new or empty folder.

    Raises:
        InputError: a checkpoint that cannot be read or has no adapters, or an output folder in use.
        TrainingError: the files cannot be written.
    """
    opened = open_model(source, frozen=False)
    model = opened.model
    if model.config.lora is None:
        raise InputError(f"--checkpoint={source}: has no adapters, all parameters were trained")
    others, adapters = parts.split(model.params, parts.is_adapter)
    if others:
        raise InputError(f"--checkpoint={source}: other parameters were trained too, such as {parts.paths(others)[0]}")
    lora, base = model.config.lora, opened.base
    if opened.run is not None:
        lora = dataclasses.replace(lora, dropout=opened.config.lora.dropout)
    named = None if base["name"] == RANDOM else base["name"]
    with jax.set_mesh(opened.mesh):
        peft.save_adapter(output, lora, adapters, named, base["weights"])
    return opened


def import_pretrained(source: str, config: ConfigDict, run_folder: Path) -> None:
    """Makes a run folder whose checkpoint of step 0 has the weights and the tokenizer of a checkpoint; needs no data.

    Args:
        source: a Hugging Face folder or hub id, or one in PEFT's format.
        config: the recipe to prepare it for; its model's shape and its tokenizer become those of `source`.
        run_folder: a folder without checkpoints.

    Raises:
        InputError: a source or a recipe that cannot be used, or a run folder in use.
        TrainingError: the checkpoint cannot be written.
    """
    if (run_folder / FOLDER).exists():
        raise InputError(f"--output={run_folder}: has checkpoints already; choose another folder")
    source = str(Path(source).absolute()) if Path(source).is_dir() else source
    adapter, base = adapter_and_base(source, "--import_from", config.lora.base_dtype, config.model.name_or_path)
    if adapter is not None:
        config.lora.update(name_or_path=source, **dataclasses.asdict(adapter))
    config.model.update(name_or_path=base, from_scratch=False)
    config.data.tokenizer = base
    imported(config, run_folder)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("checkpoint", None, f"What to export: {CHECKPOINTS}.")
    flags.DEFINE_string("import_from", None, "What to import: a Hugging Face folder or hub id.")
    flags.DEFINE_string("output", None, "The folder to write: Hugging Face's of an export, a run's of an import.")
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of an export's tensors; default: the checkpoint's.")
    flags.DEFINE_bool("adapter", False, "Export a LoRA run's adapters in PEFT's format, without their base.")
    config_flags.DEFINE_config_file("config", None, "The recipe of an import; default: configs/base.py.")


def main(argv: list[str]) -> None:
    """The command."""
    cli.no_positional(argv)
    options = flags.FLAGS
    if (options.checkpoint is None) == (options.import_from is None):
        raise InputError("give one of --checkpoint=RUN_DIR (export) and --import_from=HF_DIR_OR_HUB_ID (import)")
    if options.output is None:
        raise InputError("--output is missing: the folder to write")
    output = Path(options.output)
    if options.checkpoint is not None:
        if options["config"].present:
            raise InputError("--config is for --import_from; with --checkpoint the run says what the model is")
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
