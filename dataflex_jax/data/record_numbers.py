"""Numbers of the data's records, token by token: how much a row, or a turn in it, is worth."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sources.messages import is_weight
from dataflex_jax.data.text.chat import spoken_messages
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.policies.base import RecordNumbers

OfRow = Callable[[int], Float[np.ndarray, " n"]]


def record_numbers(wanted: RecordNumbers | None, pool: Pool, data: ConfigDict) -> dict[str, OfRow]:
    """What the loader adds to each batch; nothing where no policy wants numbers. Reads all records once.

    Args:
        wanted: which numbers.
        pool: the training rows.
        data: `config.data`, whose rows they are.

    Raises:
        InputError: rows that are no records, or turns that cannot be told apart; a value that is no number >= 0, with
            its file and line.
    """
    if wanted is None:
        return {}
    what = f"the numbers {wanted.field!r} of records"
    if pool.records() is None:
        raise InputError(f"{what}: rows of documents, and packed ones, are no records; config.data.packing=False")
    if wanted.of == "record":
        values = np.array([_of_record(wanted.field, *found) for found in _records(pool, wanted)], np.float32)
        return {"record_numbers": lambda i: values[i : i + 1]}
    if data.train_on_prompt:
        raise InputError(f"{what}: of turns they need config.data.train_on_prompt=False")
    turns = [
        _of_turns(wanted.field, domain, data, pool, i, place, fields)
        for i, (domain, place, fields) in enumerate(_located(pool, wanted))
    ]
    return {"record_numbers": lambda i: _spread(turns[i], pool.row(i).mask)}


def _records(pool: Pool, wanted: RecordNumbers):
    return ((place, fields) for _, place, fields in _located(pool, wanted))


def _located(pool: Pool, wanted: RecordNumbers):
    """(domain, a function that says where it lies, fields) of each row's record."""
    for domain in pool.domains:
        reader = domain.store.stream.reader
        if wanted.of == "turns" and "messages" not in reader.fields:
            raise InputError(f"domain {domain.name!r}: records of {reader.formatting} have no messages with numbers")
        columns = reader.columns if wanted.of == "turns" else ()
        optional = reader.optional_columns if wanted.of == "turns" else (wanted.field.split(".")[0],)
        for part, record in domain.store.located_records("train", columns, optional):
            yield domain, lambda part=part, record=record: part.place(record.index), record.fields


def _of_record(field: str, place: Callable[[], str], fields: Mapping[str, Any]) -> float:
    value: Any = fields
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return _number(field, place, value)


def _number(field: str, place: Callable[[], str], value: Any) -> float:
    if value is None:
        return 1.0
    if not is_weight(value):
        raise InputError(f"{place()}: {field!r} is {one_line(repr(value), 80)}; a finite number >= 0 is expected")
    return float(value)


def _of_turns(
    field: str,
    domain: Domain,
    data: ConfigDict,
    pool: Pool,
    i: int,
    place: Callable[[], str],
    fields: Mapping[str, Any],
) -> Float[np.ndarray, " turns"]:
    """The number of each turn of row `i` that is trained on."""
    messages = domain.store.conversation(fields).messages
    given = fields[domain.store.stream.reader.fields["messages"]]
    first = len(messages) - len(given)  # 1 where the system prompt is a field of its own
    context_only = {number for number, message in enumerate(messages) if not message.get("target", True)}
    spoken = spoken_messages(messages, context_only, mask_history=data.mask_history)
    shown = _runs(pool.row(i).mask).max(initial=-1) + 1
    cut_off = pool.length(i) + 1 >= data.cutoff_len
    if shown != len(spoken) and not (cut_off and shown < len(spoken)):
        reason = f"of {len(spoken)} turns to train on, {shown} can be told apart in the tokens"
        raise InputError(f"{place()}: {reason}; the weights {field!r} of turns need a template that separates them")
    numbers = [_number(field, place, given[number - first].get(field)) for number in spoken[:shown]]
    return np.array(numbers, np.float32)


def _runs(mask: Bool[np.ndarray, " n"]) -> np.ndarray:
    """The number, from 0, of the last run of true values that has begun; -1 before the first."""
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    return np.cumsum(begins) - 1


def _spread(numbers: Float[np.ndarray, " turns"], mask: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The numbers of the turns, each at its own tokens; 0 elsewhere."""
    return np.where(mask, numbers[np.maximum(_runs(mask), 0)], np.float32(0))
