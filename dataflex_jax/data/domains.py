"""The domains of a run, whatever the kind of data: documents in rows of `seq_len` tokens, or instruction examples."""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.rows import DocumentRows, ExampleRows, PackedRows, Rows
from dataflex_jax.data.sources.table import is_instruction
from dataflex_jax.data.stores.documents import open_document_stores
from dataflex_jax.data.stores.examples import open_example_stores
from dataflex_jax.data.stores.store import Store
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.files import digest

_BUCKET_MULTIPLE = 8


class Domain(NamedTuple):
    """One domain.

    Attributes:
        name: of the domain.
        key: changes when its rows do (`seq_len` aside, which a checkpoint names by itself).
        train: the training rows.
        valid: the held-out rows; may be none.
        store: where the rows come from.
    """

    name: str
    key: str
    train: Rows
    valid: Rows
    store: Store


def open_domains(data: ConfigDict, *, progress: bool = True) -> tuple[tuple[Domain, ...], Tokenizer]:
    """Opens the domains that `config.data` names, tokenising what is not in the cache yet.

    Args:
        data: the `data` section of a config (see configs/base.py for the fields).
        progress: show a bar with rate and remaining time on stderr.

    Returns:
        The domains, in order of `data.domains` (sorted by name where that is None), and the tokenizer.

    Raises:
        InputError: bad input or options, in one line.
        TrainingError: no space left; what was built is kept.
    """
    if is_instruction(data):
        stores, tokenizer = open_example_stores(data, progress=progress)
        return example_domains(stores, buckets(data), packing=data.packing), tokenizer
    stores, tokenizer = open_document_stores(data, progress=progress)
    return document_domains(stores, data.seq_len), tokenizer


def document_domains(stores: Sequence[Store], seq_len: int) -> tuple[Domain, ...]:
    """Documents in rows of `seq_len` tokens.

    Raises:
        InputError: a domain with less than one row.
    """
    for store in stores:
        if store.train.num_rows(seq_len) < 1:
            raise InputError(
                f"domain {store.name!r} has {store.train.num_tokens} training tokens, less than one row of "
                f"config.data.seq_len + 1 = {seq_len + 1}"
            )
    return tuple(
        Domain(
            store.name,
            store.key,
            DocumentRows(store.train, seq_len),
            DocumentRows(store.valid, seq_len, partial=True),
            store,
        )
        for store in stores
    )


def example_domains(stores: Sequence[Store], buckets: tuple[int, ...], *, packing: bool) -> tuple[Domain, ...]:
    """Examples one a row, or packed into training rows of the largest bucket; held-out ones always one a row."""
    domains = []
    for store in stores:
        key, train = store.key, ExampleRows(store.train, buckets)
        if packing:
            key, train = digest([key, "packed", buckets[-1]]), PackedRows(store.train, buckets[-1])
        domains.append(Domain(store.name, key, train, ExampleRows(store.valid, buckets), store))
    return tuple(domains)


def buckets(data: ConfigDict) -> tuple[int, ...]:
    """The lengths that batches of examples are padded to: `data.buckets`, or fractions of `data.cutoff_len`."""
    if data.buckets is not None:
        return tuple(data.buckets)
    shares = (-(-data.cutoff_len // part) for part in (8, 4, 2, 1))
    return tuple(sorted({-(-share // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE for share in shares}))
