"""What must fit together before a run begins: tokens and weights, rows and positions, parameters and memory."""

import logging

import jax.numpy as jnp
from ml_collections import ConfigDict

from dataflex_jax.data.text.tokenizer import Tokenizer, is_made, load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.reporting.hardware import total_memory_bytes
from dataflex_jax.training.locate import tokenizer_of
from dataflex_jax.training.weights import resolved_model, vocab_size_of

logger = logging.getLogger(__name__)

_NAMED = "model.name_or_path"
# Each byte of it is a token of "bytes"; other tokenizers know some of its words.
_PROBE = "The year 1999, été"


def check_tokenizer(config: ConfigDict) -> None:
    """Refuses a tokenizer that pretrained weights cannot have been trained with, before any text is read.

    Raises:
        InputError: it makes its tokens itself, and the weights' own has others; or it has more of them than the model.
    """
    if config.model.from_scratch:
        return
    if is_made(config.data.tokenizer):
        _check_made(config.data, config.model.name_or_path)
    resolved_model(config, _opened(config.data.tokenizer, config.data).vocab_size)


def _check_made(data: ConfigDict, source: str) -> None:
    theirs = tokenizer_of(source, _NAMED)
    try:
        tokenizer = _opened(theirs, data)
    except InputError as error:
        reason = f"the weights have no tokenizer that says whether they know these tokens ({error})"
        raise InputError(reason, option="data.tokenizer", value=data.tokenizer) from error
    if tokenizer.encode_batch([_PROBE]) != [list(_PROBE.encode())]:
        reason = f"the weights of {source} were trained with other tokens; leave it out, or set it to {source!r}"
        raise InputError(reason, option="data.tokenizer", value=data.tokenizer)


def check_vocabulary(source: str, tokenizer: Tokenizer, option: str = "--checkpoint") -> None:
    """Refuses a model that has no rows for some tokens: it would read others in their place.

    Raises:
        InputError: says how rows are added.
    """
    rows = vocab_size_of(source, option)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is {rows}; make a model with "
            f"rows for them: python -m dataflex_jax.export --import_from={source} --output=RUN_DIR "
            "--config.model.resize_vocab=True",
            option=option,
            value=source,
        )


def check_memory(model: ModelConfig) -> None:
    """Refuses a model whose parameters alone are more than the memory of all devices, before any of it is taken.

    Raises:
        InputError: says how many bytes are needed.
    """
    needed = model.num_params() * jnp.dtype(model.param_dtype).itemsize
    there = total_memory_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"config.model: {model.num_params():,} parameters take {needed / 1e9:,.1f} GB in {model.param_dtype}, and "
            f"all devices together have {there / 1e9:,.1f} GB; choose a smaller shape"
        )


def warn_of_long_rows(config: ConfigDict, model: ModelConfig, longest: int) -> None:
    """Says it where rows are longer than what pretrained weights have seen; they are trained on all the same.

    Args:
        config: of the run.
        model: its model.
        longest: tokens of the longest rows.
    """
    positions = model.max_position_embeddings
    if config.model.from_scratch or longest <= positions:
        return
    scaling = model.rope_scaling
    stretched = f", stretched from {scaling.original_max_position_embeddings}" if scaling else ""
    logger.warning(
        "Rows have up to %d tokens, but %s was made for %d (max_position_embeddings%s): later positions are new to it. "
        "config.data.seq_len, of instruction data config.data.cutoff_len, limits them.",
        longest,
        config.model.name_or_path,
        positions,
        stretched,
    )


def _opened(spec: str, data: ConfigDict) -> Tokenizer:
    return load_tokenizer(spec, texts=lambda: iter(()), cache_dir=data.cache_dir, eos_token=data.eos_token)
