"""The model that `config.model` asks for: the shape of a checkpoint, changed or given field by field."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.models import families
from dataflex_jax.models.config import EXPERT_FIELDS, ModelConfig, RopeScaling
from dataflex_jax.models.hf import config as hf
from dataflex_jax.models.hf import folders

logger = logging.getLogger(__name__)

_RUN = ("dtype", "remat", "scan_layers", "attention")
_OURS = (*_RUN, "param_dtype")
_ELSEWHERE = ("name_or_path", "from_scratch", "resize_vocab", "architecture", "trainable", *_OURS)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
)
# What a model from scratch has where its shape is not given: trained on a CPU within minutes.
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
SMALL_WIDTHS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
VOCAB_MULTIPLE = 128  # a round vocabulary splits over devices and suits the matrix units


def model_config(model: ConfigDict, vocab_size: int, shape: Mapping[str, Any] | None = None) -> ModelConfig:
    """Resolves `config.model`; fields that are not None win over those of `name_or_path`.

    But where its weights are read, the fields that say how large they are give way to what they are.

    Args:
        model: the section.
        vocab_size: how many tokens the tokenizer has.
        shape: the contents of a config.json in place of `name_or_path`'s.

    Raises:
        InputError: a folder or hub id without config.json, a shape that is incomplete or unsupported, or a vocabulary
            smaller than the tokenizer's where it does not grow.
    """
    given = {name: value for name, value in model.items() if name not in _ELSEWHERE and value is not None}
    if model.name_or_path is not None:
        if shape is None:
            folder = folders.local_folder(model.name_or_path, [folders.CONFIG], "model.name_or_path")
            shape = hf.read_shape(folder)
        shape = hf.in_our_names(shape)
        if not model.from_scratch:
            given = _without_sizes(given, shape, grows=model.resize_vocab)
    else:
        shape = {"model_type": model.architecture, "vocab_size": _rounded(vocab_size), **SMALL}
        if model.num_attention_heads is None:
            shape |= SMALL_HEADS
        shape |= _small_mixture(model.architecture)
    # Both ways: a required field must be there to be read, and config.json may hold rope_theta under another name.
    config = hf.from_hf(shape | given, **given, **{name: model[name] for name in _OURS})
    return dataclasses.replace(config, vocab_size=_rows(model, vocab_size, config.vocab_size))


def _small_mixture(architecture: str) -> dict[str, int]:
    known = families.family(architecture)
    if known.experts is None:
        return {}
    return SMALL_EXPERTS | {name: width for name, width in SMALL_WIDTHS.items() if name in known.defaults}


def _rows(model: ConfigDict, vocab_size: int, found: int) -> int:
    """How many tokens the model has, of which it has `found` so far."""
    rows = found
    if model.resize_vocab and (vocab_size > found or model.vocab_size is not None):
        rows = max(found, model.vocab_size or _rounded(vocab_size))
    if vocab_size <= rows:
        return rows
    if not model.from_scratch and not model.resize_vocab:
        way = "set config.model.resize_vocab=True, which adds rows to the weights,"
    elif model.name_or_path is None:
        way = f"set config.model.vocab_size to at least {vocab_size}, or None,"
    else:
        way = f"set config.model.vocab_size to at least {vocab_size}"
    raise InputError(
        f"the tokenizer has {vocab_size} tokens, but the model's vocab_size is {rows}; {way} or choose another "
        "config.data.tokenizer"
    )


def _without_sizes(given: dict[str, Any], shape: Mapping[str, Any], grows: bool) -> dict[str, Any]:
    differing = [
        f"config.model.{name} = {given[name]} gives way to {shape.get(name)}"
        for name in _SIZES
        if name in given and given[name] != shape.get(name) and not (grows and name == "vocab_size")
    ]
    if differing:
        logger.info("The weights say how large the model is: %s.", ", ".join(differing))
    return {name: value for name, value in given.items() if name not in _SIZES}


def describe(config: ModelConfig) -> dict[str, Any]:
    """The shape, without adapters and how it is run: what a checkpoint must agree with."""
    aside = (*_RUN, "lora", *(EXPERT_FIELDS if config.family.experts is None else ()))
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in aside}


def described_config(saved: Mapping[str, Any], model: ConfigDict) -> ModelConfig:
    """The model of a checkpoint: what `describe` said of it when it was saved, run as `model` says."""
    rope = saved["rope_scaling"]
    scaling = None if rope is None else RopeScaling(**rope)
    return ModelConfig(**{**saved, "rope_scaling": scaling}, **{name: model[name] for name in _RUN})


def _rounded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
