"""What one pass reads from: a file, a Hugging Face dataset or records in memory, each to be read again and again."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dataflex_jax.data.sources.files import (
    FORMATS,
    INSTRUCTION_FORMATS,
    Record,
    read_records,
    record_place,
    split_format,
)
from dataflex_jax.errors import InputError
from dataflex_jax.files import one_line

HELD_OUT_NAMES = ("validation", "valid")
_DATASET_ROWS = 1000


class Part(Protocol):
    """A file or dataset: a re-readable sequence of records."""

    @property
    def size(self) -> int:
        """Bytes, for progress."""

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do; `hash_file(path)` is the digest of a whole file."""

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on; `columns` are the top-level fields wanted, `optional` those read if there."""

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
        _, suffix = split_format(self.path.name, FORMATS + INSTRUCTION_FORMATS)
        return suffix + ":" + hash_file(self.path)

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on."""
        return read_records(self.path, columns, start, optional)

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

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on."""
        names = self.dataset.column_names
        for column in columns:
            if column not in names:
                raise InputError(f"{self.name}: no column {column!r}; it has {', '.join(names)}")
        columns = [*columns, *(column for column in optional if column in names)]
        rows, size, index = len(self.dataset), self.size, start
        wanted = self.dataset.select_columns(columns).select(range(min(start, rows), rows))
        for batch in wanted.iter(batch_size=_DATASET_ROWS):
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield Record(index, size * (index + 1) // rows, dict(zip(columns, values, strict=True)), None)
                index += 1

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return f"{self.name}: row {index}"


@dataclasses.dataclass(frozen=True)
class RecordsPart:
    """Records held in memory (one domain of the built-in corpus)."""

    name: str
    rows: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)

    @functools.cached_property
    def _lines(self) -> tuple[bytes, ...]:
        return tuple(json.dumps(row).encode() for row in self.rows)

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return sum(map(len, self._lines))

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        del hash_file
        return "records:" + hashlib.blake2b(b"\n".join(self._lines), digest_size=16).hexdigest()

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on, with all their fields."""
        del columns, optional
        position = 0
        for index, (row, line) in enumerate(zip(self.rows, self._lines, strict=True)):
            position += len(line)
            if index >= start:
                yield Record(index, position, row, None)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return f"{self.name}: record {index}"


def file_parts(paths: Sequence[Path]) -> tuple[FilePart, ...]:
    """A part for each file."""
    return tuple(FilePart(path) for path in paths)


def dataset_parts(
    root: str, config: str | None, split: str, folder: str | None = None, *, root_option: str, split_option: str
) -> tuple[tuple[DatasetPart, ...], tuple[DatasetPart, ...]]:
    """The training part of a Hugging Face dataset, and its held-out part if it has a split named so.

    Args:
        root: a hub id, or a local folder (one that `save_to_disk` wrote, or of data files).
        config: the dataset's configuration (subset), or None.
        split: the training split.
        folder: a folder of the dataset's repository to load alone, or None.
        root_option: what `root` was given as, for messages.
        split_option: what `split` was given as, for messages.

    Raises:
        InputError: it cannot be loaded, or has no such split.
    """
    train, valid = _load_datasets(root, config, split, folder, root_option, split_option)
    parts = (DatasetPart(f"{root} [{split}]", train),)
    return parts, (DatasetPart(f"{root} [held out]", valid),) if valid is not None else ()


def _load_datasets(
    root: str, config: str | None, split: str, data_dir: str | None, root_option: str, split_option: str
) -> tuple[Any, Any | None]:
    import datasets

    folder = Path(root).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded, None
            if split not in loaded:
                raise InputError(f"{split_option}={split!r}: {root} has {', '.join(loaded)}")
            valid = next((loaded[n] for n in HELD_OUT_NAMES if n in loaded and n != split), None)
            return loaded[split], valid
        name = str(folder) if folder.is_dir() else root
        train = datasets.load_dataset(name, config, data_dir=data_dir, split=split)
        splits = train.info.splits or {}
        held_out = next((n for n in HELD_OUT_NAMES if n in splits and n != split), None)
        if held_out is None:
            return train, None
        return train, datasets.load_dataset(name, config, data_dir=data_dir, split=held_out)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{root_option}={root}: cannot be loaded as a Hugging Face dataset "
            f"(config {config!r}, split {split!r}): {one_line(error)}"
        ) from error
