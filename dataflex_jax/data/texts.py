"""The text of rows, for models with another tokenizer than the rows' own."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import ExampleRows
from dataflex_jax.data.text.tokenizer import Tokenizer


def row_texts(pool: Pool, ids: Int64[np.ndarray, " n"], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each row, in order.

    A row that is one record has the contents of all its messages, a line between them: neither the template nor
    `data.cutoff_len` touches them. A row of documents has what its inputs decode to, without special tokens.

    Args:
        pool: where the rows are; none of them packed.
        ids: which of them, increasing.
        tokenizer: of the rows.
    """
    for number, domain in enumerate(pool.domains):
        first, end = pool.offsets[number : number + 2]
        places = ids[(ids >= first) & (ids < end)] - first
        rows = getattr(domain, pool.split)
        if isinstance(rows, ExampleRows):
            yield from _of_records(domain, pool.split, places)
        else:
            for place in places.tolist():
                yield tokenizer.decode(rows.row(place).tokens[:-1], special=False)


def _of_records(domain: Domain, split: str, places: Int64[np.ndarray, " n"]) -> Iterator[str]:
    if not len(places):
        return
    wanted = iter(places.tolist())
    place = next(wanted)
    for found, conversation in enumerate(domain.store.conversations(split, place), start=place):
        if found == place:
            yield conversation.plain_text()
            place = next(wanted, None)
            if place is None:
                return
