"""The rows store: every domain's documents, an end of text after each. Any `seq_len` reads from the same store."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dataflex_jax.data.stores.build import Event, token_dtype
from dataflex_jax.data.stores.cache import open_stores
from dataflex_jax.data.stores.store import Store
from dataflex_jax.data.stores.writer import Column, Item
from dataflex_jax.data.text.tokenizer import Tokenizer


class DocumentEncoder:
    """Documents: the text's tokens and an end of text; a `build.Encoder`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.columns = (Column("tokens", token_dtype(tokenizer)),)
        begin = tokenizer.begin_ids
        self.identity: dict[str, Any] = {"begin_ids": list(begin)} if begin else {}

    def encode(self, events: Sequence[Event]) -> list[Item]:
        """The item of each text."""
        documents = self._tokenizer.encode_documents([event.text for event in events])
        (column,) = self.columns
        return [
            Item((np.array(tokens, column.dtype),), {"bytes": event.size})
            for event, tokens in zip(events, documents, strict=True)
        ]


def open_document_stores(data: ConfigDict, *, progress: bool = True) -> tuple[tuple[Store, ...], Tokenizer]:
    """Opens the rows store of every domain of `config.data`, building what is missing; see `cache.open_stores`."""
    return open_stores(data, DocumentEncoder, progress=progress)
