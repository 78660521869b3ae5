"""Where documents and conversations come from: local files, Hugging Face datasets, or the built-in corpus.

`open_source(config.data)` finds the files and says which domains they hold; nothing is read yet. A `Stream` is what one
pass over its parts reads: usually one domain, or, with `data.domain_field`, all of them at once. Its `Reader` makes one
text of a record: a document's, or the canonical JSON of a conversation (`is_instruction`).
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from dataflex_jax.data.sources import builtin, builtin_chat, dataset_info, instruct, mmlu
from dataflex_jax.data.sources.files import FORMATS, INSTRUCTION_FORMATS, check_links, split_format
from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.parts import HELD_OUT_NAMES, Part, RecordsPart, dataset_parts, file_parts
from dataflex_jax.errors import InputError

logger = logging.getLogger(__name__)

FORMATTINGS = (*instruct.FORMATTINGS, mmlu.FORMATTING)


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
            return None, f"no field {self.field!r} (data.text_field); the record has {', '.join(fields) or 'none'}"
        text = fields[self.field]
        if not isinstance(text, str):
            kind = type(text).__name__
            return None, f"field {self.field!r} (data.text_field) must be a string but is {kind}"
        return text, None


def is_instruction(data: ConfigDict) -> bool:
    """Whether `config.data` names conversations (one example a row), not documents."""
    return data.source == "dataset_info" or data.formatting is not None


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
                return None, f"no field {self.domain_field!r} (data.domain_field); the record has {', '.join(fields)}"
            value = value[key]
        if isinstance(value, str):
            return value, None
        kind = type(value).__name__
        return None, f"field {self.domain_field!r} (data.domain_field) must be a string but is {kind}"

    def _text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        text, problem = self.reader.text(fields)
        if problem is None:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return None, f"the text holds an unpaired surrogate (character {error.start})"
        return text, problem


def open_source(data: ConfigDict) -> tuple[Stream, ...]:
    """Finds the input that `config.data` names.

    Returns:
        The streams, in order of `data.domains` where each holds one domain.

    Raises:
        InputError: nothing there, an unknown domain (the available ones are listed), or options that do not fit.
    """
    domains = None if data.domains is None else tuple(data.domains)
    _check_domain_options(data, domains)
    if data.source == "dataset_info":
        return _dataset_info_streams(data, domains)
    reader = _reader(data)
    if data.source == "builtin":
        return _builtin_streams(data, domains)
    if data.source == "local":
        return _local_streams(data, domains, reader)
    if data.source == "hub":
        return _hub_streams(data, domains, reader)
    raise InputError(f"data.source={data.source!r}: accepted are builtin, local, hub and dataset_info")


def _reader(data: ConfigDict) -> Reader:
    if data.formatting is None:
        return TextReader(data.text_field)
    return mmlu.MmluReader() if data.formatting == mmlu.FORMATTING else ConversationReader.usual(data.formatting)


def _check_domain_options(data: ConfigDict, domains: tuple[str, ...] | None) -> None:
    if domains is not None and (not domains or len(set(domains)) < len(domains)):
        raise InputError(f"data.domains={domains}: name each domain once, at least one (or None: all found)")
    if data.domain_values is not None:
        if data.domain_field is None or domains is None:
            raise InputError("data.domain_values needs data.domain_field and data.domains")
        if len(data.domain_values) != len(domains) or len(set(data.domain_values)) < len(domains):
            raise InputError(
                f"data.domain_values={tuple(data.domain_values)}: give one distinct value for each of the "
                f"{len(domains)} data.domains"
            )
    if data.domain_field is not None and data.source in ("builtin", "dataset_info"):
        raise InputError(
            f"data.domain_field: not with data.source={data.source!r}, which names its domains; leave it None"
        )


def _wanted(domains: tuple[str, ...] | None, available: Sequence[str], where: str) -> tuple[str, ...]:
    for name in domains or ():
        if name not in available:
            raise InputError(f"data.domains: {name!r} is not in {where}; available: {', '.join(sorted(available))}")
    return tuple(sorted(available)) if domains is None else domains


def _field_domains(data: ConfigDict, domains: tuple[str, ...] | None) -> Mapping[str | None, str] | None:
    if domains is None:
        return None
    return dict(zip(domains if data.domain_values is None else data.domain_values, domains, strict=True))


def _builtin_streams(data: ConfigDict, domains: tuple[str, ...] | None) -> tuple[Stream, ...]:
    if data.formatting is None:
        corpus, reader = builtin, TextReader("text")
    elif data.formatting == "alpaca":
        corpus, reader = builtin_chat, ConversationReader.usual("alpaca")
    else:
        raise InputError(
            f"data.formatting={data.formatting!r}: with data.source='builtin' accepted are None and 'alpaca'"
        )
    return tuple(
        Stream((RecordsPart(f"builtin {name}", corpus.records(name)),), (), {None: name}, reader)
        for name in _wanted(domains, tuple(corpus.DOMAINS), "the builtin corpus")
    )


def _dataset_info_streams(data: ConfigDict, domains: tuple[str, ...] | None) -> tuple[Stream, ...]:
    if data.formatting is not None:
        raise InputError("data.formatting: with data.source='dataset_info' each entry has its own; leave it None")
    entries = dataset_info.read(data.root)
    names = dataset_info.local(entries) if domains is None else domains
    if not names:
        raise InputError(
            f"data.root={data.root}: no dataset of dataset_info.json is a local file; name the wanted ones in "
            f"data.domains; available: {', '.join(sorted(entries)) or 'none'}"
        )
    streams = []
    for name in _wanted(names, tuple(entries), f"data.root={data.root}, dataset_info.json"):
        train, valid, reader = dataset_info.open_entry(entries[name])
        streams.append(Stream(train, valid, {None: name}, reader))
    return tuple(streams)


def _local_streams(data: ConfigDict, domains: tuple[str, ...] | None, reader: Reader) -> tuple[Stream, ...]:
    if not data.root:
        raise InputError("data.root is not set; data.source='local' needs the folder with the data files")
    root = Path(data.root).expanduser()
    kind = _file_kind(data)
    try:
        if data.domain_field is not None:
            files = _data_files(root, kind.formats) if root.is_dir() else [root]
            return (_field_stream(data, root, files, domains, reader, kind),)
        found = _local_domains(root, kind)
    except OSError as error:
        raise InputError(f"data.root={data.root}: cannot be read: {error.strerror}") from error
    streams = []
    for name in _wanted(domains, tuple(found), f"data.root={data.root}"):
        train, valid = found[name]
        streams.append(Stream(kind.parts(train), kind.parts(valid), {None: name}, reader))
    return tuple(streams)


class _FileKind(NamedTuple):
    """What local data files are like: how their names end, the domain of one by the rest of its name, how they are
    read."""

    formats: tuple[str, ...]
    domain: Callable[[str], str]
    parts: Callable[[Sequence[Path]], tuple[Part, ...]]


def _file_kind(data: ConfigDict) -> _FileKind:
    if data.formatting == mmlu.FORMATTING:
        return _FileKind(mmlu.FORMATS, mmlu.subject_of, mmlu.mmlu_parts)
    return _FileKind(INSTRUCTION_FORMATS if is_instruction(data) else FORMATS, str, file_parts)


def _data_files(folder: Path, formats: Sequence[str]) -> list[Path]:
    shown = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    check_links(shown)
    return [p for p in shown if split_format(p.name, formats) and p.name != dataset_info.NAME and p.is_file()]


def _is_held_out(path: Path, formats: Sequence[str]) -> bool:
    return split_format(path.name, formats)[0].endswith(".valid")


def _local_domains(root: Path, kind: _FileKind) -> dict[str, tuple[list[Path], list[Path]]]:
    """{domain: (training files, held-out files)} of a folder with one file, or one sub-folder, a domain."""
    inputs: dict[str, list[Path]] = {}
    train: dict[str, list[Path]] = {}
    valid: dict[str, list[Path]] = {}
    formats = kind.formats
    entries = sorted(root.iterdir())
    check_links(entries)
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith((".", "_")):
            name, files = entry.name, _data_files(entry, formats)
        elif split_format(entry.name, formats) and entry.name != dataset_info.NAME and entry.is_file():
            name, files = kind.domain(split_format(entry.name, formats)[0].removesuffix(".valid")), [entry]
        else:
            continue
        held_out = [path for path in files if _is_held_out(path, formats)]
        training = [path for path in files if path not in held_out]
        if training:
            inputs.setdefault(name, []).append(entry)
            train.setdefault(name, []).extend(training)
        if held_out:
            valid.setdefault(name, []).extend(held_out)
    for name, several in inputs.items():
        if len(several) > 1:
            listed = ", ".join(entry.name for entry in several)
            raise InputError(
                f"{root}: domain {name!r} has several inputs ({listed}); keep one, or use a folder {name}/"
            )
    for name, paths in valid.items():
        if name not in train:
            raise InputError(f"{paths[0]}: held-out file of domain {name!r}, which has no training file")
    if not train:
        raise InputError(f"{root}: no data files; expected NAME.EXT or NAME/*.EXT with EXT one of {', '.join(formats)}")
    return {name: (train[name], valid.get(name, [])) for name in train}


def _field_stream(
    data: ConfigDict,
    root: Path,
    files: list[Path],
    domains: tuple[str, ...] | None,
    reader: Reader,
    kind: _FileKind,
) -> Stream:
    if not root.exists():
        raise InputError(f"data.root={data.root}: no such file or folder")
    train, valid, tests = [], [], 0
    for path in files:
        if split_format(path.name, kind.formats) is None:
            raise InputError(f"{path}: unknown format; accepted are {', '.join(kind.formats)}")
        folders = path.relative_to(root).parts[:-1]
        if _is_held_out(path, kind.formats) or any(folder in HELD_OUT_NAMES for folder in folders):
            valid.append(path)
        elif "test" in folders:
            tests += 1
        else:
            train.append(path)
    if tests:
        logger.warning("%s: %d files in folders named test are left out of training", root, tests)
    if not train:
        raise InputError(f"{root}: no data files; expected some *.EXT with EXT one of {', '.join(kind.formats)}")
    return Stream(kind.parts(train), kind.parts(valid), _field_domains(data, domains), reader, data.domain_field)


def _hub_streams(data: ConfigDict, domains: tuple[str, ...] | None, reader: Reader) -> tuple[Stream, ...]:
    if not data.root:
        raise InputError("data.root is not set; data.source='hub' needs a dataset id or a save_to_disk folder")
    train, valid = dataset_parts(
        data.root, data.hub_config, data.hub_split, root_option="data.root", split_option="data.hub_split"
    )
    if data.domain_field is not None:
        return (Stream(train, valid, _field_domains(data, domains), reader, data.domain_field),)
    (name,) = _wanted(domains, (Path(data.root).name,), f"data.root={data.root} (no data.domain_field)")
    return (Stream(train, valid, {None: name}, reader),)
