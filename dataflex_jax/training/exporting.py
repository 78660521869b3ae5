"""A checkpoint written for other tools: a model as a Hugging Face folder, or its adapters as a PEFT folder."""

import dataclasses
import json
import logging
import tempfile
from pathlib import Path

import jax

from dataflex_jax.data.text.pretrained import quiet_transformers
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models import parts
from dataflex_jax.models.hf import peft, weights
from dataflex_jax.training.weights import RANDOM, Opened, open_model

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
    # As the folder has it, also where the texts of an older run do not begin with its bos_token.
    tokenizer = load_tokenizer(opened.tokenizer_source, texts=lambda: iter(()), cache_dir=opened.tokenizer_source)
    with jax.set_mesh(opened.mesh), tempfile.TemporaryDirectory() as folder:
        model = opened.model.without_adapters(dtype or opened.model.config.param_dtype)
        tokenizer.save(folder)
        weights.save_pretrained(output, model.config, model.whole(), folder, dtype=dtype)
    if jax.process_index() == 0:
        _warn_of_other_rules(output)
    return opened


def _warn_of_other_rules(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    transformers = quiet_transformers()
    chosen = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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
