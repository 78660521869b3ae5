"""Datasets of the Hugging Face hub, and folders that `save_to_disk` wrote."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dataflex_jax.data.sources.files import Record, faults_named
from dataflex_jax.data.sources.formattings import formatting
from dataflex_jax.data.sources.streams import Stream, field_domains, wanted_domains
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import expanded

_DATASET_ROWS = 1000
_HELD_OUT_NAMES = ("validation", "valid")


def hub_streams(data: ConfigDict) -> tuple[Stream]:
    """The dataset as one stream: a domain of its name, or those of `data.domain_field`.

    Raises:
        InputError: it cannot be loaded, or has no such split or domain.
    """
    train, valid = dataset_parts(data.root, data.hub_config, data.hub_split)
    reader = formatting(data.formatting).reader(data)
    if data.domain_field is not None:
        return (Stream(train, valid, field_domains(data), reader, data.domain_field),)
    (name,) = wanted_domains(data, (Path(data.root).name,), f"{data.root} (without domain_field)")
    return (Stream(train, valid, {None: name}, reader),)


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
        with faults_named(self.name):
            yield from self._records(columns, start, optional)

    def _records(self, columns: Sequence[str], start: int, optional: Sequence[str]) -> Iterator[Record]:
        names = self.dataset.column_names
        for column in columns:
            if column not in names:
                raise InputError(f"{self.name}: no column {column!r}; it has {', '.join(names)}")
        columns = [*columns, *(column for column in optional if column in names)]
        rows, size, index = len(self.dataset), self.size, start
        wanted = self.dataset.select_columns(columns).select(range(min(start, rows), rows))
        for batch in wanted.iter(batch_size=_DATASET_ROWS):
            for values in zip(*(batch[column] for column in columns), strict=True):
                fields = dict(zip(columns, values, strict=True))
                yield Record(index, size * (index + 1) // rows, fields, None, filled=True)
                index += 1

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages."""
        return f"{self.name}: row {index}"


def dataset_parts(
    root: str, config: str | None, split: str, folder: str | None = None
) -> tuple[tuple[DatasetPart, ...], tuple[DatasetPart, ...]]:
    """The training part of a Hugging Face dataset, and its held-out part if it has a split named so.

    Args:
        root: a hub id, or a local folder (one that `save_to_disk` wrote, or of data files).
        config: the dataset's configuration (subset), or None.
        split: the training split.
        folder: a folder of the dataset's repository to load alone, or None.

    Raises:
        InputError: it cannot be loaded ("data.root"), or has no such split ("data.hub_split").
    """
    train, valid = _load_datasets(root, config, split, folder)
    parts = (DatasetPart(f"{root} [{split}]", train),)
    return parts, (DatasetPart(f"{root} [held out]", valid),) if valid is not None else ()


def _load_datasets(root: str, config: str | None, split: str, data_dir: str | None) -> tuple[Any, Any | None]:
    import datasets

    folder = Path(expanded(root))
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded, None
            if split not in loaded:
                raise InputError(f"{root} has {', '.join(loaded)}", option="data.hub_split", value=split)
            valid = next((loaded[n] for n in _HELD_OUT_NAMES if n in loaded and n != split), None)
            return loaded[split], valid
        name = str(folder) if folder.is_dir() else root
        train = datasets.load_dataset(name, config, data_dir=data_dir, split=split)
        splits = train.info.splits or {}
        held_out = next((n for n in _HELD_OUT_NAMES if n in splits and n != split), None)
        if held_out is None:
            return train, None
        return train, datasets.load_dataset(name, config, data_dir=data_dir, split=held_out)
    except InputError:
        raise
    except Exception as error:  # the library lets through what its readers raise
        raise InputError(
            f"cannot be loaded as a Hugging Face dataset (config {config!r}, split {split!r}): {one_line(error)}",
            option="data.root",
            value=root,
        ) from error
