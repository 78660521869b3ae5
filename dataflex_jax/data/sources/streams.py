"""What one pass over some files or datasets reads, and which domains it holds.

A `Stream` is usually one domain, or, with `data.domain_field`, all of them at once. Its `Reader` makes one text of a
record: a document's, or the canonical JSON of a conversation.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from dataflex_jax.data.sources.files import MAX_RECORD_BYTES
from dataflex_jax.data.sources.parts import Part
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import parse_json


class Reader(Protocol):
    """What of a record is its text.

    Attributes:
        columns: fields that the records of a table must have.
        optional_columns: further fields, read where they are.
        identity: JSON that changes when the texts do.
    """

    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    identity: dict[str, Any]

    def text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """(text, None), or (None, what is wrong with the record)."""


@dataclasses.dataclass(frozen=True)
class TextReader:
    """Documents: the text is one field."""

    field: str
    optional_columns = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The field."""
        return (self.field,)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes when the texts do."""
        return {"text_field": self.field}

    def text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """(text, None), or (None, what is wrong with the record)."""
        if self.field not in fields:
            return None, f"no field {self.field!r} (option text_field); the record has {names_in(fields)}"
        text = fields[self.field]
        if not isinstance(text, str):
            return None, f"field {self.field!r} (option text_field) must be a string but is {type_name(text)}"
        return text, None


class Document(NamedTuple):
    """A record reduced to its text. `text` is None exactly when `problem` says why."""

    index: int
    position: int
    value: str | None  # of data.domain_field; None without one, or where the record lacks it
    text: str | None
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Stream:
    """What one pass reads, in order, and the domains it holds.

    Attributes:
        train: parts with training documents.
        valid: parts with held-out documents; empty: the held-out split is taken from `train` by hash.
        domains: {value of `domain_field`: domain name}; {None: name} without a field; None: all values found.
        reader: makes the text of a record.
        domain_field: dotted field that says which domain a record belongs to, or None.
    """

    train: tuple[Part, ...]
    valid: tuple[Part, ...]
    domains: Mapping[str | None, str] | None
    reader: Reader
    domain_field: str | None = None

    def documents(self, part: Part, start: int = 0) -> Iterator[Document]:
        """Documents of one part from record `start` on, the bad ones with their problem, where they lie included."""
        columns = list(self.reader.columns)
        if self.domain_field and (top := self.domain_field.split(".")[0]) not in columns:
            columns.append(top)
        optional = [column for column in self.reader.optional_columns if column not in columns]
        for record in part.records(columns, start, optional):
            value, text, problem = None, None, record.problem
            if problem is None:
                value, problem = self._domain_value(record.fields)
            if problem is None:
                text, problem = self._text(without_nulls(record.fields) if record.filled else record.fields)
            if problem is not None:
                problem = f"{part.place(record.index)}: {problem}"
            yield Document(record.index, record.position, value, text, problem)

    def _domain_value(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        if self.domain_field is None:
            return None, None
        value: Any = fields
        keys = self.domain_field.split(".")
        for number, key in enumerate(keys):
            if isinstance(value, str) and value.lstrip().startswith("{"):
                try:
                    value = parse_json(value)  # RedPajama's "meta" is JSON in a string
                except ValueError as error:
                    return None, f"field {'.'.join(keys[:number])!r} is a string and no JSON: {one_line(error)}"
            if not isinstance(value, Mapping):
                what = f"field {'.'.join(keys[:number])!r} is {type_name(value)}, not an object (or its JSON)"
                return None, f"no field {self.domain_field!r} (option domain_field): {what}"
            if key not in value:
                holder = f"field {'.'.join(keys[:number])!r}" if number else "the record"
                return None, f"no field {self.domain_field!r} (option domain_field); {holder} has {names_in(value)}"
            value = value[key]
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value), None
        kind = type_name(value)
        return None, f"field {self.domain_field!r} (option domain_field) must be a string or an integer but is {kind}"

    def _text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        text, problem = self.reader.text(fields)
        if problem is not None:
            return None, problem
        if len(text) > MAX_RECORD_BYTES:
            return None, f"the text is longer than {MAX_RECORD_BYTES >> 20} MiB; split it into several"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return None, f"the text holds an unpaired surrogate (character {error.start})"
        return text, None


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A table's record without the fields of its objects, at any depth, that are null.

    Arrow gives all objects of a column the same fields, so that one that is not there and null are the same. The
    record's own fields stay.
    """
    return {name: _without_nulls(value) for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def type_name(value: Any) -> str:
    """The type of a record's value, for messages."""
    return "null" if value is None else type(value).__name__


def names_in(fields: Mapping[str, Any]) -> str:
    """The names of a record's fields, for messages."""
    return one_line(", ".join(map(str, fields)) or "none", 200)


def wanted_domains(data: ConfigDict, available: Sequence[str], where: str) -> tuple[str, ...]:
    """The names in `data.domains`; where that is None all that are `available`, sorted.

    Args:
        data: the `data` section of a config.
        available: names of the domains that there are.
        where: they are, for messages.

    Raises:
        InputError: an unknown domain.
    """
    if data.domains is None:
        return tuple(sorted(available))
    for name in data.domains:
        if name not in available:
            listed = ", ".join(sorted(available))
            raise InputError(f"{name!r} is not in {where}; available: {listed}", option="data.domains")
    return tuple(data.domains)


def field_domains(data: ConfigDict) -> Mapping[str | None, str] | None:
    """`Stream.domains` of records whose `data.domain_field` says their domain."""
    if data.domains is None:
        return None
    return dict(zip(data.domains if data.domain_values is None else data.domain_values, data.domains, strict=True))
