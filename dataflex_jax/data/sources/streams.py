"""What one pass over some files or datasets reads, and which domains it holds.

A `Stream` is usually one domain, or, with `data.domain_field`, all of them at once. Its `Reader` makes one text of a
record: a document's, or the canonical JSON of a conversation.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from dataflex_jax.data.sources.parts import Part
from dataflex_jax.errors import InputError


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
            return None, f"no field {self.field!r} (option text_field); the record has {', '.join(fields) or 'none'}"
        text = fields[self.field]
        if not isinstance(text, str):
            kind = type(text).__name__
            return None, f"field {self.field!r} (option text_field) must be a string but is {kind}"
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
                text, problem = self._text(record.fields)
            if problem is not None:
                problem = f"{part.place(record.index)}: {problem}"
            yield Document(record.index, record.position, value, text, problem)

    def _domain_value(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        if self.domain_field is None:
            return None, None
        value: Any = fields
        for key in self.domain_field.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None, f"no field {self.domain_field!r} (option domain_field); the record has {', '.join(fields)}"
            value = value[key]
        if isinstance(value, str):
            return value, None
        kind = type(value).__name__
        return None, f"field {self.domain_field!r} (option domain_field) must be a string but is {kind}"

    def _text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        text, problem = self.reader.text(fields)
        if problem is None:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return None, f"the text holds an unpaired surrogate (character {error.start})"
        return text, problem


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
