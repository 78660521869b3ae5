"""The examples store: every domain's conversations, with what of each is a target.

Beside the tokens it has the columns "targets" (bool, one a token) and "ids" (int64, one an example). Examples that have
no target, or none within `data.cutoff_len`, are left out and counted.

An example's id is its record's number in the source, `part * 2**32 + record`: of a domain with one file simply the
number of the record, from 0. It does not depend on the template, the tokenizer or the options.
"""

import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.stores.build import Event, Rejection, token_dtype
from dataflex_jax.data.stores.cache import open_stores
from dataflex_jax.data.stores.store import PART_BITS, Store
from dataflex_jax.data.stores.writer import Column, Item
from dataflex_jax.data.text.chat import (
    ChatEncoder,
    EncodedChat,
    chosen_template,
    special_tokens,
    template_text,
    tuned_with,
)
from dataflex_jax.data.text.tokenizer import Tokenizer


class ExampleEncoder:
    """Conversations: their tokens and targets, cut off at `data.cutoff_len`; a `build.Encoder`."""

    def __init__(self, data: ConfigDict, template: str | None, tokenizer: Tokenizer):
        self._chat = ChatEncoder(
            tokenizer,
            template_text(template, tokenizer),
            train_on_prompt=data.train_on_prompt,
            mask_history=data.mask_history,
            cutoff_len=data.cutoff_len,
        )
        self.identity = self._chat.identity
        self.columns = (
            Column("tokens", token_dtype(tokenizer)),
            Column("targets", "bool"),
            Column("ids", "int64", per_item=True),
        )

    def encode(self, events: Sequence[Event]) -> list[Item | Rejection]:
        """The item of each conversation."""
        encoded = self._chat.encode_batch([Conversation.from_json(event.text) for event in events])
        return [self._item(event, chat) for event, chat in zip(events, encoded, strict=True)]

    def _item(self, event: Event, chat: EncodedChat | str) -> Item | Rejection:
        if isinstance(chat, str):
            return Rejection("bad", chat)
        if not chat.targets.any():
            return Rejection("untargeted", "no target, or none within data.cutoff_len")
        identity = (event.after.part << PART_BITS) + event.after.index - 1
        columns = (chat.tokens.astype(self.columns[0].dtype), chat.targets, np.array([identity]))
        return Item(columns, {"bytes": chat.target_bytes, "targets": int(chat.targets.sum())})


def open_example_stores(data: ConfigDict, *, progress: bool = True) -> tuple[tuple[Store, ...], Tokenizer]:
    """Opens the examples store of every domain of `config.data`, building what is missing; see `cache.open_stores`.

    The tokenizer's chat template is the one that was used, at whose end of turn it stops.
    """
    template = chosen_template(data.template, data.tokenizer)
    stores, tokenizer = open_stores(
        data,
        functools.partial(ExampleEncoder, data, template),
        plain_text=lambda text: Conversation.from_json(text).plain_text(),
        special_tokens=special_tokens(template),
        progress=progress,
    )
    return stores, tuned_with(tokenizer, template_text(template, tokenizer))
