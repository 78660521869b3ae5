"""The source records of chosen rows, as a file that a later run trains on."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_file


def check_records(pool: Pool) -> None:
    """Refuses rows whose records no one file can hold.

    Raises:
        InputError: rows of documents, or of datasets that are read in different ways.
    """
    if pool.records() is None:
        raise InputError("--records: rows of documents are no records; instruction data are (config.data.formatting)")
    first, *others = pool.domains
    for other in others:
        if other.store.record_format != first.store.record_format:
            raise InputError(
                f"--records: {first.name!r} and {other.name!r} have other formats or columns, which one file cannot "
                "hold; leave it out, or choose datasets of one format by --config.data.domains"
            )


def chosen_records(pool: Pool, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """The source records of rows of examples, in the order of `ids`."""
    wanted, found, place = set(ids.tolist()), {}, 0
    for domain in pool.domains:
        for record in domain.store.records("train"):
            if place in wanted:
                found[place] = dict(record)
            place += 1
    return (found[i] for i in ids.tolist())


def write_records(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """Writes records as JSONL or Parquet, by the file's name; in Parquet a field that some lack is null there.

    Raises:
        InputError: neither .jsonl nor .parquet.
    """
    check_path(path)
    if path.suffix == ".parquet":
        rows = list(records)
        fields = dict.fromkeys(field for row in rows for field in row)
        # A table has the fields of its first row otherwise.
        complete = [{field: row.get(field) for field in fields} for row in rows]
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(complete), file)
        replace_file(path, file.getvalue())
    else:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        replace_file(path, "".join(lines).encode())


def check_path(path: Path) -> None:
    """Refuses a file that `write_records` cannot write.

    Raises:
        InputError: neither .jsonl nor .parquet.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--records={path}: must end in .jsonl or .parquet")
