"""Checkpoints to and from Hugging Face's format.

    python -m dataflex_jax.export --checkpoint=RUN_DIR --output=HF_DIR
        [--dtype=bfloat16 | --adapter]
    python -m dataflex_jax.export --import_from=HF_DIR_OR_HUB_ID --output=RUN_DIR
        [--config=RECIPE[:variant] ...]

--checkpoint is a run folder (its newest step) or one step's folder; HF_DIR then holds config.json,
safetensors, the tokenizer and generation_config.json, which says where a response ends, as
`transformers` and other tools read them. --import_from makes a run folder with the checkpoint of
step 0, prepared for a recipe, by default configs/base.py. To train on from it:

    python -m dataflex_jax.train --config=RECIPE[:variant] --workdir=RUN_DIR
        --config.model.from_scratch=False --config.model.name_or_path=HF_DIR_OR_HUB_ID
        --config.data.tokenizer=HF_DIR_OR_HUB_ID

Of a LoRA run the model is exported with the adapters merged into it, or, with --adapter, the
adapters alone in PEFT's format. --import_from takes such a folder too: its base is
--config.model.name_or_path, or the one it names, and the recipe trains on with the --config.lora
fields that the new run's config.json has.
"""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import transformers
from absl import flags
from ml_collections import ConfigDict, config_flags

from dataflex_jax import cli, train
from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError
from dataflex_jax.models import lora
from dataflex_jax.models.hf import folders, peft
from dataflex_jax.models.hf import weights as hf
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import resume
from dataflex_jax.training.checkpoint import FOLDER, Checkpoints, locate
from dataflex_jax.training.weights import read_adapters, read_checkpoint

logger = logging.getLogger(__name__)


def export_checkpoint(run_folder: Path, step: int, output: Path, dtype: str | None = None) -> None:
    """Writes a checkpoint as a Hugging Face folder, with adapters merged into their base.

    Args:
        run_folder: of the checkpoint.
        step: of the checkpoint.
        output: a new or empty folder.
        dtype: of the tensors, "float32" or "bfloat16"; None: that of the checkpoint.

    Raises:
        InputError: a checkpoint that cannot be read, or an output folder in use.
        TrainingError: the files cannot be written.
    """
    trained = configuration.read(run_folder)
    mesh = make_mesh({"fsdp": -1})
    with Checkpoints(run_folder, writable=False) as checkpoints, jax.set_mesh(mesh):
        model, _, params = read_checkpoint(checkpoints, step, trained, mesh)
        if model.lora is not None:
            params = lora.merge(*lora.split(params), model.lora, dtype or model.param_dtype)
        hf.save_pretrained(output, model, params, run_folder / "tokenizer", dtype=dtype)
    if jax.process_index() == 0:
        _warn_of_other_rules(output)


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


def export_adapter(run_folder: Path, step: int, output: Path) -> None:
    """Writes the adapters of a LoRA run's checkpoint as a PEFT folder. The base itself is not read.

    Args:
        run_folder: of the checkpoint.
        step: of the checkpoint.
        output: a new or empty folder.

    Raises:
        InputError: a checkpoint that cannot be read or has no adapters, or an output folder in use.
        TrainingError: the files cannot be written.
    """
    trained = configuration.read(run_folder)
    mesh = make_mesh({"fsdp": -1})
    with Checkpoints(run_folder, writable=False) as checkpoints, jax.set_mesh(mesh):
        model, adapters, base = read_adapters(checkpoints, step, trained, mesh)
        config = dataclasses.replace(model.lora, dropout=trained.lora.dropout)
        named = trained.model.name_or_path if not trained.model.from_scratch else None
        peft.save_adapter(output, config, adapters, named, base["weights"])


def import_pretrained(source: str, config: ConfigDict, run_folder: Path) -> None:
    """Makes a run folder whose checkpoint of step 0 has the weights and the tokenizer of a Hugging Face checkpoint.

    Args:
        source: a folder or a hub id.
        config: the recipe to prepare it for; its model's shape and its tokenizer become those of `source`.
        run_folder: a folder without checkpoints.

    Raises:
        InputError: a source or a recipe that cannot be used, or a run folder in use.
        TrainingError: the checkpoint cannot be written.
    """
    if (run_folder / FOLDER).exists():
        raise InputError(f"--output={run_folder}: has checkpoints already; choose another folder")
    if Path(source).is_dir():
        source = str(Path(source).absolute())
    folder = folders.local_folder(source, [folders.CONFIG, peft.CONFIG], "--import_from")
    if (folder / peft.CONFIG).is_file():
        adapter, named = peft.read_lora_config(source, "--import_from", config.lora.base_dtype)
        config.lora.update(name_or_path=source, **dataclasses.asdict(adapter))
        source = config.model.name_or_path or named
        if source is None:
            raise InputError(f"{folder / peft.CONFIG}: does not name its base; give it as --config.model.name_or_path")
    config.model.update(name_or_path=source, from_scratch=False)
    config.data.tokenizer = source
    with train.prepared(config, run_folder) as (job, state, position):
        job.checkpoints.save(position.sampler.step, state, resume.to_json(job.identity, position))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("checkpoint", None, "What to export: a run folder, or one step's folder in it.")
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
        run_folder, step = locate(options.checkpoint)
        if options.adapter:
            export_adapter(run_folder, step, output)
        else:
            export_checkpoint(run_folder, step, output, options.dtype)
        kind = "PEFT adapter" if options.adapter else "Hugging Face checkpoint"
        print(f"Step {step} of {run_folder} is now a {kind} in {output}.")
    else:
        if options.adapter:
            raise InputError("--adapter is for --checkpoint; --import_from finds out what a folder holds")
        if options.dtype is not None:
            raise InputError("--dtype is for --checkpoint; the parameters of a run have --config.model.param_dtype")
        import_pretrained(options.import_from, cli.chosen_config(default="configs/base.py"), output)
        print(f"{options.import_from} is now step 0 of {output}.")


if __name__ == "__main__":
    cli.run(main, define_flags)
