"""The model that `config.model` asks for: the shape of a checkpoint, changed or given field by field."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from ml_collections import ConfigDict

from dataflex_jax.data.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ModelConfig

_OURS = ("dtype", "param_dtype", "remat", "attention")
_ELSEWHERE = ("name_or_path", "from_scratch", "architecture", *_OURS)
VOCAB_MULTIPLE = 128  # a round vocabulary splits over devices and suits the matrix units


def model_config(model: ConfigDict, tokenizer: Tokenizer) -> ModelConfig:
    """Resolves `config.model`; fields that are not None win over those of `name_or_path`.

    Raises:
        InputError: a folder or hub id without config.json, a shape that is incomplete or unsupported, or a vocabulary
            smaller than the tokenizer's.
    """
    if not model.from_scratch:
        raise InputError("config.model.from_scratch = False: importing weights is not supported; set it to True")
    given = {name: value for name, value in model.items() if name not in _ELSEWHERE and value is not None}
    if model.name_or_path is not None:
        shape = _pretrained_shape(model.name_or_path) | given
    else:
        shape = {"model_type": model.architecture, "vocab_size": _rounded(tokenizer.vocab_size), **given}
    config = ModelConfig.from_hf(shape, **{name: model[name] for name in _OURS})
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is {config.vocab_size}; set "
            "config.model.vocab_size to at least that, or None, or choose another config.data.tokenizer"
        )
    return config


def describe(config: ModelConfig) -> dict[str, Any]:
    """The shape, without how it is run: what a checkpoint must agree with."""
    return {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("dtype", "remat", "attention")
    }


def _rounded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _pretrained_shape(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    try:
        file = (
            path / "config.json"
            if path.is_dir()
            else Path(huggingface_hub.hf_hub_download(name_or_path, "config.json"))
        )
        return json.loads(file.read_text())
    except (
        OSError,
        ValueError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        EntryNotFoundError,
        LocalEntryNotFoundError,
    ) as e:
        reason = str(e).strip().splitlines()[0]
        raise InputError(
            f"config.model.name_or_path = {name_or_path!r}: no readable config.json there; a folder that holds one or a hub "
            f"id is accepted ({reason})"
        ) from e
