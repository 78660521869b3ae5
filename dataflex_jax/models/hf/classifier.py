"""Checkpoints of sequence classification, such as reward models: a decoder with a head on a text's last token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dataflex_jax.errors import InputError
from dataflex_jax.models import layout
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf import config as hf_config
from dataflex_jax.models.hf import folders
from dataflex_jax.models.hf.tensors import check_dtype, stored_tensors
from dataflex_jax.models.hf.weights import WEIGHT_FILES, load_params, read_tensor
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import replicated

HEAD = "score.weight"


class Classifier(NamedTuple):
    """A decoder, and the head that makes logits of the last hidden state of a text's last token."""

    model: Model
    head: Float[Array, "D L"]


def open_classifier(name_or_path: str, mesh: Mesh, like: ModelConfig, option: str) -> Classifier:
    """Reads a checkpoint that `transformers` wrote of a ...ForSequenceClassification of one of the families.

    Args:
        name_or_path: a folder or a hub id.
        mesh: the devices, over which its parameters are split.
        like: the model whose compute dtype and attention it has; its parameters are kept in that dtype too.
        option: what the user set to `name_or_path`, for messages.

    Raises:
        InputError: no such checkpoint, one of another family, without a head, or damaged.
    """
    folder = folders.local_folder(name_or_path, WEIGHT_FILES, option)
    shape = hf_config.read_shape(folder)
    # There is no output head over the vocabulary, which a tied one does not need.
    config = hf_config.from_hf(
        shape, tie_word_embeddings=True, dtype=like.dtype, param_dtype=like.dtype, attention=like.attention
    )
    stored = stored_tensors(folder)
    head = stored.get(HEAD)
    if head is None:
        raise InputError(
            f"{folder}: has no tensor {HEAD!r}, the head of a sequence-classification checkpoint; a reward model is "
            "accepted, a language model is not",
            option=option,
            value=name_or_path,
        )
    check_dtype(head)
    if len(head.shape) != 2 or head.shape[1] != config.hidden_size or head.shape[0] < 1:
        wanted = f"[labels, {config.hidden_size}]"
        raise InputError(f"{head.file}: tensor {HEAD!r} has shape {list(head.shape)}; {wanted} is needed")
    model = Model.shape(config)
    abstract = jax.eval_shape(lambda key: Model.random(config, key).params, jax.random.key(0))
    params = load_params(str(folder), layout.placed(mesh, abstract), option, part=True)
    weight = read_tensor(head, replicated(mesh)).T.astype(jnp.float32)
    return Classifier(model.having(params), weight)


def probability(logits: Float[Array, "B L"]) -> Float[Array, " B"]:
    """The sigmoid of one logit, or of several the last one's share of their softmax."""
    return jax.nn.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else jax.nn.softmax(logits)[:, -1]
