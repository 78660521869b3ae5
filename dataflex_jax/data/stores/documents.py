"""The rows store: every domain's documents tokenised once into flat, memory-mapped token files.

`*.tokens` holds all documents of a split one after the other, an end-of-text id after each (uint16, or uint32 for
vocabularies over 65,536); `*.offsets` (int64 [documents + 1]) says where each starts and the last one ends. Any
`seq_len` reads from the same store. `cache.py` says where it lies and when it is built.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from dataflex_jax.data.stores.build import DocumentEncoder
from dataflex_jax.data.stores.cache import StoredSplit, StoreFolder, open_folders, skipped_records
from dataflex_jax.data.stores.writer import SPLITS
from dataflex_jax.data.text.tokenizer import Tokenizer


class TokenArray(StoredSplit):
    """One split of one domain's documents, an end of text after each."""

    def num_rows(self, seq_len: int) -> int:
        """Rows of `seq_len` inputs and their next tokens; only the last partial row is left out."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def row(self, i: int, seq_len: int) -> Int32[np.ndarray, " seq_len+1"]:
        """Row `i`: `tokens[i*T : i*T + T + 1]`, its last token being the first of the next row.

        Raises:
            IndexError: `i` is not in [0, num_rows(seq_len)).
        """
        if not 0 <= i < self.num_rows(seq_len):
            raise IndexError(f"row {i} of {self.num_rows(seq_len)} rows of {seq_len} tokens in {self.path}")
        return self.tokens[i * seq_len : (i + 1) * seq_len + 1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DomainStore:
    """One domain's documents as token ids.

    Attributes:
        name: of the domain.
        key: hash of content, tokenizer and options (32 hex digits).
        path: the store's folder.
        train: training split.
        valid: held-out split, never trained on; may be empty.
        skipped_records: bad records passed over (data.on_bad_record="skip"), those without a domain included.
    """

    name: str
    key: str
    path: str
    train: TokenArray
    valid: TokenArray
    skipped_records: int


def open_stores(data: ConfigDict, *, progress: bool = True) -> tuple[tuple[DomainStore, ...], Tokenizer]:
    """Opens the rows store of every domain of `config.data`, building what is missing; see `cache.open_folders`.

    Args:
        data: the `data` section of a config (see configs/base.py for the fields).
        progress: show a bar with rate and remaining time on stderr.

    Returns:
        The stores, in order of `data.domains` (sorted by name where that is None), and the tokenizer.

    Raises:
        InputError: bad input or options, in one line.
        TrainingError: no space left; what was built is kept.
    """
    folders, tokenizer = open_folders(data, DocumentEncoder, progress=progress)
    return tuple(map(_open_store, folders)), tokenizer


def _open_store(folder: StoreFolder) -> DomainStore:
    train, valid = (TokenArray(**folder.split(name)) for name in SPLITS)
    return DomainStore(folder.name, folder.key, str(folder.path), train, valid, skipped_records(folder.meta()))
