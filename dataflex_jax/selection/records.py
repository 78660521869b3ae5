"""The source records of chosen rows, as a file that a later run trains on."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_file


def check_records(pool: Pool) -> None:
    """Refuses rows that have no records.

    Raises:
        InputError: rows of documents, or packed ones.
    """
    if pool.packed:
        raise InputError("--records: a packed row has several; set it to False", option="data.packing", value=True)
    if pool.records() is None:
        raise InputError("--records: rows of documents are no records; instruction data are (config.data.formatting)")


def have_one_format(pool: Pool) -> bool:
    """Whether all records are read in the same way, so that a file may hold them as they are."""
    first, *others = (domain.store.record_format for domain in pool.domains)
    return all(other == first for other in others)


def chosen_records(pool: Pool, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """The records of rows of examples, in the order of `ids`: as they are, or where formats differ, as `messages`."""
    as_they_are = have_one_format(pool)
    wanted, found, place = set(ids.tolist()), {}, 0
    for domain in pool.domains:
        for record in domain.store.records("train"):
            if place in wanted:
                found[place] = dict(record) if as_they_are else as_messages(domain.store.conversation(record))
            place += 1
    return (found[i] for i in ids.tolist())


def as_messages(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a record of data.formatting = "openai"; what has no fixed fields is JSON text, as OpenAI's."""
    record: dict[str, Any] = {"messages": [_message(message) for message in conversation.messages]}
    if conversation.tools is not None:
        record["tools"] = json.dumps(conversation.tools, ensure_ascii=False)
    return record


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(message)
    if "target" in made:
        made["weight"] = int(made.pop("target"))
    if "tool_calls" in made:
        made["tool_calls"] = [
            {**call, "function": {"name": function["name"], "arguments": json.dumps(function["arguments"])}}
            for call in made["tool_calls"]
            for function in (call["function"],)
        ]
    return made


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
