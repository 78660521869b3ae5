"""The highest and the lowest scored candidates of a selection, as text to look at."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_jax.data.pool import Pool
from dataflex_jax.files import replace_file
from dataflex_jax.selection.choosing import Chosen

MOST = 10
_CHARACTERS = 400

Decode = Callable[[Iterable[int]], str]


def extremes(pool: Pool, chosen: Chosen, decode: Decode) -> list[dict[str, Any]]:
    """The `MOST` candidates of the highest scores, from the highest down, then those of the lowest, from the lowest up.

    Candidates without a finite score are left out; of equal scores the first in the pool comes first.

    Args:
        pool: the candidates.
        chosen: of them, with the scores of all.
        decode: the text of token ids.

    Returns:
        Of each: `end` ("highest" or "lowest"), `id`, `domain`, `record` (None of rows of documents), `score`, `length`
        (inputs), `chosen`, and the beginning of its `text`.
    """
    finite = np.flatnonzero(np.isfinite(chosen.all_scores))
    scores, records = chosen.all_scores[finite], pool.records()
    order = {"highest": np.argsort(-scores, kind="stable"), "lowest": np.argsort(scores, kind="stable")}

    def described(end: str, i: int) -> dict[str, Any]:
        return {
            "end": end,
            "id": i,
            "domain": pool.domains[int(pool.domain_of(i))].name,
            "record": None if records is None else int(records[i]),
            "score": float(chosen.all_scores[i]),
            "length": pool.length(i),
            "chosen": bool((chosen.ids == i).any()),
            # A token is a character or more, all but always.
            "text": decode(pool.row(i).tokens[:_CHARACTERS])[:_CHARACTERS],
        }

    return [described(end, int(finite[place])) for end, places in order.items() for place in places[:MOST]]


def write_extremes(path: Path, pool: Pool, chosen: Chosen, decode: Decode) -> None:
    """Writes `extremes`, one JSON object a line."""
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in extremes(pool, chosen, decode))
    replace_file(path, "".join(lines).encode())
