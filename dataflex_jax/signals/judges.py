"""What a sequence-classification model, which has its own tokenizer, makes of texts."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.data.listed import input_rows
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.text.chat import ChatEncoder
from dataflex_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf.classifier import open_classifier, probability
from dataflex_jax.policies.signals import Embeddings, Exchange
from dataflex_jax.signals.registry import Subject, row_function
from dataflex_jax.signals.sweep import Sweeper, source

_OPTION = "selector.reward"


def judged(
    judge: str,
    exchanges: Sequence[Exchange],
    conversations: Sequence[Conversation] | None,
    like: ModelConfig,
    sweeper: Sweeper,
) -> Float[np.ndarray, " n"]:
    """The classifier's probability of each exchange; see `policies.signals.Signals.judge`.

    It is in memory only meanwhile: between two selections the memory is the training's.

    Args:
        judge: a folder or hub id.
        exchanges: at least one.
        conversations: of their targets, each with its own response in it; None: there are only texts.
        like: the model in training, whose compute dtype it has.
        sweeper: runs the sweep.

    Raises:
        InputError: see `open_classifier`; no tokenizer beside it, or one whose template refuses a conversation.
    """
    classifier = open_classifier(judge, sweeper.mesh, like, _OPTION)
    tokenizer = load_tokenizer(judge, texts=lambda: iter(()), cache_dir=judge)
    if conversations is None or tokenizer.chat_template is None:
        texts = tokenizer.encode_rendered([exchange.text for exchange in exchanges])
    else:
        texts = _templated(judge, tokenizer, exchanges, conversations)
    rows = input_rows([ids or [tokenizer.eos_id] for ids in texts])
    operands = Subject(classifier.model), classifier.head
    swept = source(rows.pool("judged texts"), sweeper.mesh)
    return sweeper.run(row_function(_JUDGED), operands, swept, np.arange(rows.num_rows), "rewards of responses")


def _templated(
    judge: str, tokenizer: Tokenizer, exchanges: Sequence[Exchange], conversations: Sequence[Conversation]
) -> list[list[int]]:
    encoder = ChatEncoder(tokenizer, tokenizer.chat_template)
    asked = [answered(*each) for each in zip(conversations, exchanges, strict=True)]
    encoded = encoder.encode_batch(asked)
    for exchange, chat in zip(exchanges, encoded, strict=True):
        if isinstance(chat, str):
            reason = f"its chat template has no form for {exchange.task.where}: {chat}"
            raise InputError(reason, option=_OPTION, value=judge)
    return [chat.tokens.tolist() for chat in encoded]


def answered(conversation: Conversation, exchange: Exchange) -> Conversation:
    """The conversation up to the response that was the reference, with another one in its place."""
    messages = conversation.messages
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    reference = "".join(exchange.task.reference.split())
    # Of several the last one, unless the row was cut off before it.
    said = [i for i in spoken if "".join(messages[i]["content"].split()).startswith(reference)]
    place = (said or spoken)[-1]
    return Conversation([*messages[:place], {"role": "assistant", "content": exchange.response}], conversation.tools)


def _last(hidden: Float[Array, "B T D"], real: Float[Array, "B T"]) -> Float[Array, "B D"]:
    place = jnp.maximum(jnp.sum(real, axis=1).astype(jnp.int32) - 1, 0)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def _probability(last: Float[Array, "B D"], head: Float[Array, "D L"]) -> Float[Array, " B"]:
    return probability(jnp.matmul(last, head, precision="highest"))


_JUDGED = Embeddings(_last, then=_probability)
