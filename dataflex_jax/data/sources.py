"""Where documents come from: local files, Hugging Face datasets, or the built-in corpus.

`open_source(config.data)` finds the files and says which domains they hold; nothing is read yet. A `Stream` is what one
pass over its parts reads: usually one domain, or, with `data.domain_field`, all of them at once.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from dataflex_jax.data import builtin
from dataflex_jax.data.records import (
    FORMATS,
    Record,
    one_line,
    read_records,
    record_place,
    split_format,
)
from dataflex_jax.errors import InputError

logger = logging.getLogger(__name__)

_HELD_OUT_NAMES = ("validation", "valid")
_DATASET_ROWS = 1000


class Part(Protocol):
    """A file or dataset: a re-readable sequence of records."""

    @property
    def size(self) -> int:
        """Bytes, for progress."""

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do; `hash_file(path)` is the digest of a whole file."""

    def records(self, columns: Sequence[str], start: int) -> Iterator[Record]:
        """Records from number `start` on; `columns` are the top-level fields wanted."""

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""


@dataclasses.dataclass(frozen=True)
class FilePart:
    """One data file."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return self.path.stat().st_size

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        _, suffix = split_format(self.path.name)
        return suffix + ":" + hash_file(self.path)

    def records(self, columns: Sequence[str], start: int) -> Iterator[Record]:
        """Records from number `start` on."""
        return read_records(self.path, columns, start)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return record_place(self.path, index)


@dataclasses.dataclass(frozen=True)
class DatasetPart:
    """One split of a Hugging Face dataset (memory-mapped Arrow)."""

    name: str
    dataset: Any  # datasets.Dataset

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return self.dataset.data.nbytes

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        files = [hash_file(Path(file["filename"])) for file in self.dataset.cache_files]
        return ":".join(["dataset", str(self.dataset.split), str(len(self.dataset)), *files])

    def records(self, columns: Sequence[str], start: int) -> Iterator[Record]:
        """Records from number `start` on."""
        names = self.dataset.column_names
        for column in columns:
            if column not in names:
                raise InputError(f"{self.name}: no column {column!r}; it has {', '.join(names)}")
        rows, size, index = len(self.dataset), self.size, start
        wanted = self.dataset.select_columns(list(columns)).select(range(min(start, rows), rows))
        for batch in wanted.iter(batch_size=_DATASET_ROWS):
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield Record(index, size * (index + 1) // rows, dict(zip(columns, values, strict=True)), None)
                index += 1

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return f"{self.name}: row {index}"


@dataclasses.dataclass(frozen=True)
class TextsPart:
    """Documents held in memory (one domain of the built-in corpus)."""

    name: str
    texts: tuple[str, ...] = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return sum(len(text.encode()) for text in self.texts)

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        del hash_file
        digest = hashlib.blake2b(digest_size=16)
        for text in self.texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return "texts:" + digest.hexdigest()

    def records(self, columns: Sequence[str], start: int) -> Iterator[Record]:
        """Records from number `start` on."""
        position = 0
        for index, text in enumerate(self.texts):
            position += len(text.encode())
            if index >= start:
                yield Record(index, position, {columns[0]: text}, None)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return f"{self.name}: document {index}"


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
        text_field: field of a record that holds the text.
        domain_field: dotted field that says which domain a record belongs to, or None.
    """

    train: tuple[Part, ...]
    valid: tuple[Part, ...]
    domains: Mapping[str | None, str] | None
    text_field: str
    domain_field: str | None = None

    def documents(self, part: Part, start: int = 0) -> Iterator[Document]:
        """Documents of one part from record `start` on, the bad ones with their problem, where they lie included."""
        columns = [self.text_field]
        if self.domain_field and (top := self.domain_field.split(".")[0]) != self.text_field:
            columns.append(top)
        for record in part.records(columns, start):
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
        if self.text_field not in fields:
            return None, f"no field {self.text_field!r} (data.text_field); the record has {', '.join(fields) or 'none'}"
        text = fields[self.text_field]
        if not isinstance(text, str):
            kind = type(text).__name__
            return None, f"field {self.text_field!r} (data.text_field) must be a string but is {kind}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return None, f"field {self.text_field!r} holds an unpaired surrogate (character {error.start})"
        return text, None


def open_source(data: ConfigDict) -> tuple[Stream, ...]:
    """Finds the input that `config.data` names.

    Returns:
        The streams, in order of `data.domains` where each holds one domain.

    Raises:
        InputError: nothing there, an unknown domain (the available ones are listed), or options that do not fit.
    """
    domains = None if data.domains is None else tuple(data.domains)
    _check_domain_options(data, domains)
    if data.source == "builtin":
        return _builtin_streams(domains)
    if data.source == "local":
        return _local_streams(data, domains)
    if data.source == "hub":
        return _hub_streams(data, domains)
    raise InputError(f"data.source={data.source!r}: accepted here are builtin, local and hub")


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
    if data.domain_field is not None and data.source == "builtin":
        raise InputError("data.domain_field: the builtin corpus has no record fields; leave it None")


def _wanted(domains: tuple[str, ...] | None, available: Sequence[str], where: str) -> tuple[str, ...]:
    for name in domains or ():
        if name not in available:
            raise InputError(f"data.domains: {name!r} is not in {where}; available: {', '.join(sorted(available))}")
    return tuple(sorted(available)) if domains is None else domains


def _field_domains(data: ConfigDict, domains: tuple[str, ...] | None) -> Mapping[str | None, str] | None:
    if domains is None:
        return None
    return dict(zip(domains if data.domain_values is None else data.domain_values, domains, strict=True))


def _builtin_streams(domains: tuple[str, ...] | None) -> tuple[Stream, ...]:
    names = _wanted(domains, builtin.DOMAINS, "the builtin corpus")
    return tuple(
        Stream((TextsPart(f"builtin {name}", builtin.documents(name)),), (), {None: name}, "text") for name in names
    )


def _local_streams(data: ConfigDict, domains: tuple[str, ...] | None) -> tuple[Stream, ...]:
    if not data.root:
        raise InputError("data.root is not set; data.source='local' needs the folder with the data files")
    root = Path(data.root).expanduser()
    try:
        if data.domain_field is not None:
            files = _data_files(root) if root.is_dir() else [root]
            return (_field_stream(data, root, files, domains),)
        found = _local_domains(root)
    except OSError as error:
        raise InputError(f"data.root={data.root}: cannot be read: {error.strerror}") from error
    streams = []
    for name in _wanted(domains, tuple(found), f"data.root={data.root}"):
        train, valid = found[name]
        streams.append(Stream(_file_parts(train), _file_parts(valid), {None: name}, data.text_field))
    return tuple(streams)


def _file_parts(paths: Sequence[Path]) -> tuple[Part, ...]:
    return tuple(FilePart(path) for path in paths)


def _data_files(folder: Path) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if split_format(path.name)
        and path.is_file()
        and not any(parent.startswith(".") for parent in path.relative_to(folder).parts)
    ]
    return files


def _is_held_out(path: Path) -> bool:
    return split_format(path.name)[0].endswith(".valid")


def _local_domains(root: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """{domain: (training files, held-out files)} of a folder with one file, or one sub-folder, a domain."""
    inputs: dict[str, list[Path]] = {}
    train: dict[str, list[Path]] = {}
    valid: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith((".", "_")):
            name, files = entry.name, _data_files(entry)
        elif split_format(entry.name) and entry.is_file():
            name, files = split_format(entry.name)[0].removesuffix(".valid"), [entry]
        else:
            continue
        held_out = [path for path in files if _is_held_out(path)]
        training = [path for path in files if not _is_held_out(path)]
        if training:
            inputs.setdefault(name, []).append(entry)
            train.setdefault(name, []).extend(training)
        if held_out:
            valid.setdefault(name, []).extend(held_out)
    for name, entries in inputs.items():
        if len(entries) > 1:
            listed = ", ".join(entry.name for entry in entries)
            raise InputError(
                f"{root}: domain {name!r} has several inputs ({listed}); keep one, or use a folder {name}/"
            )
    for name, paths in valid.items():
        if name not in train:
            raise InputError(f"{paths[0]}: held-out file of domain {name!r}, which has no training file")
    if not train:
        raise InputError(f"{root}: no data files; expected NAME.EXT or NAME/*.EXT with EXT one of {', '.join(FORMATS)}")
    return {name: (train[name], valid.get(name, [])) for name in train}


def _field_stream(data: ConfigDict, root: Path, files: list[Path], domains: tuple[str, ...] | None) -> Stream:
    if not root.exists():
        raise InputError(f"data.root={data.root}: no such file or folder")
    train, valid, tests = [], [], 0
    for path in files:
        if split_format(path.name) is None:
            raise InputError(f"{path}: unknown format; accepted are {', '.join(FORMATS)}")
        folders = path.relative_to(root).parts[:-1]
        if _is_held_out(path) or any(folder in _HELD_OUT_NAMES for folder in folders):
            valid.append(path)
        elif "test" in folders:
            tests += 1
        else:
            train.append(path)
    if tests:
        logger.warning("%s: %d files in folders named test are left out of training", root, tests)
    if not train:
        raise InputError(f"{root}: no data files; expected some *.EXT with EXT one of {', '.join(FORMATS)}")
    return Stream(
        _file_parts(train), _file_parts(valid), _field_domains(data, domains), data.text_field, data.domain_field
    )


def _hub_streams(data: ConfigDict, domains: tuple[str, ...] | None) -> tuple[Stream, ...]:
    if not data.root:
        raise InputError("data.root is not set; data.source='hub' needs a dataset id or a save_to_disk folder")
    train, valid = _load_datasets(data)
    parts = (DatasetPart(f"{data.root} [{data.hub_split}]", train),)
    held_out = (DatasetPart(f"{data.root} [held out]", valid),) if valid is not None else ()
    if data.domain_field is not None:
        return (Stream(parts, held_out, _field_domains(data, domains), data.text_field, data.domain_field),)
    (name,) = _wanted(domains, (Path(data.root).name,), f"data.root={data.root} (no data.domain_field)")
    return (Stream(parts, held_out, {None: name}, data.text_field),)


def _load_datasets(data: ConfigDict) -> tuple[Any, Any | None]:
    import datasets

    folder = Path(data.root).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded, None
            if data.hub_split not in loaded:
                raise InputError(f"data.hub_split={data.hub_split!r}: {data.root} has {', '.join(loaded)}")
            valid = next((loaded[n] for n in _HELD_OUT_NAMES if n in loaded and n != data.hub_split), None)
            return loaded[data.hub_split], valid
        name = str(folder) if folder.is_dir() else data.root
        train = datasets.load_dataset(name, data.hub_config, split=data.hub_split)
        splits = train.info.splits or {}
        held_out = next((n for n in _HELD_OUT_NAMES if n in splits and n != data.hub_split), None)
        if held_out is None:
            return train, None
        return train, datasets.load_dataset(name, data.hub_config, split=held_out)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data.root={data.root}: cannot be loaded as a Hugging Face dataset "
            f"(config {data.hub_config!r}, split {data.hub_split!r}): {one_line(error)}"
        ) from error
