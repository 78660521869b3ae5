"""A domain's store on disk, memory-mapped: every item (a document or an example) one after the other.

    FOLDER/  train.COLUMN train.offsets valid.COLUMN valid.offsets meta.json

The column "tokens" has the ids (uint16, or uint32 for vocabularies over 65,536); "offsets" (int64 [items + 1]) says
where each item starts and the last one ends. examples.py has further columns. `cache.py` says when a store is built.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt

from dataflex_jax.data.sources.files import Record
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.sources.parts import Part
from dataflex_jax.data.sources.streams import Stream
from dataflex_jax.data.stores import checksums
from dataflex_jax.data.stores.writer import RECORD_COUNTS, SPLIT_COUNTS, SPLITS, Column
from dataflex_jax.errors import InputError
from dataflex_jax.files import digest, read_sealed

logger = logging.getLogger(__name__)

PART_BITS = 32  # an example's id is its part's number, then in so many bits its record's


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of one domain. Cheap to pickle: files are mapped at the first access, in whichever process.

    Attributes:
        path: the files', up to the dot before a column's name.
        dtypes: {column: dtype of its values}.
        num_tokens: of all items.
        num_documents: documents, or examples.
        num_bytes: of the text that the model predicts, in UTF-8.
        num_targets: tokens of examples that the model is trained to predict.
    """

    path: str
    dtypes: Mapping[str, str]
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_targets: int

    @functools.cached_property
    def tokens(self) -> UInt[np.ndarray, " num_tokens"]:
        """All tokens; a document's last one is an end of text."""
        return self._column("tokens")

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " num_documents+1"]:
        """Item i is `tokens[offsets[i]:offsets[i + 1]]`."""
        return self._column("offsets")

    @functools.cached_property
    def targets(self) -> Bool[np.ndarray, " num_tokens"]:
        """Of examples: which tokens the model is trained to predict; never an example's first one."""
        return self._column("targets")

    @functools.cached_property
    def ids(self) -> Int64[np.ndarray, " num_documents"]:
        """Of examples: `part * 2**PART_BITS + record` in the source, increasing."""
        return self._column("ids")

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, " num_documents"]:
        """Tokens of each item."""
        return np.diff(self.offsets)

    def num_rows(self, seq_len: int) -> int:
        """Rows of `seq_len` inputs and their next tokens; only the last partial row is left out."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def row(self, i: int, seq_len: int) -> Int32[np.ndarray, " seq_len+1"]:
        """Row `i`: `tokens[i*T : i*T + T + 1]`, its last token being the first of the next row.

        Raises:
            IndexError: `i` is not in [0, num_rows(seq_len)).
        """
        if not 0 <= i < self.num_rows(seq_len):
            raise IndexError(f"row {i} of {self.num_rows(seq_len)} rows of {seq_len} tokens in {self.path}")
        return self.tokens[i * seq_len : (i + 1) * seq_len + 1].astype(np.int32)

    def example(self, i: int) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """(tokens, targets) of example `i`.

        Raises:
            IndexError: `i` is not in [0, num_documents).
        """
        if not 0 <= i < self.num_documents:
            raise IndexError(f"example {i} of {self.num_documents} examples in {self.path}")
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part].astype(np.int32), np.array(self.targets[part])

    def _column(self, name: str) -> np.ndarray:
        path = Path(f"{self.path}.{name}")
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.empty(0, self.dtypes[name])
        return np.memmap(path, self.dtypes[name], mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a pickled memory map would carry all tokens."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Store:
    """One domain's documents or examples.

    Attributes:
        name: of the domain.
        key: hash of content, tokenizer, template and options (32 hex digits).
        path: the store's folder.
        train: training split.
        valid: held-out split, never trained on; may be empty.
        skipped_records: bad records passed over (data.on_bad_record="skip"), those without a domain included.
        stream: what it was built from.
    """

    name: str
    key: str
    path: str
    train: Split
    valid: Split
    skipped_records: int
    stream: Stream = dataclasses.field(repr=False, compare=False)

    @classmethod
    def load(cls, name: str, key: str, folder: Path, columns: Sequence[Column], stream: Stream) -> "Store":
        """The finished store in a folder."""
        meta = read_meta(folder)
        dtypes = {column.name: column.dtype for column in columns} | {"offsets": "int64"}
        splits = (
            Split(str(folder / split), dtypes, **{f"num_{what}": meta[split][what] for what in SPLIT_COUNTS})
            for split in SPLITS
        )
        return cls(name, key, str(folder), *splits, skipped_records(meta), stream)

    @property
    def has_records(self) -> bool:
        """Whether every item is a record of the source: examples are."""
        return "ids" in self.train.dtypes

    @property
    def record_format(self) -> Mapping[str, Any]:
        """How its records are read; those of stores with equal ones may be in one file."""
        return self.stream.reader.identity

    def records(self, split: str, columns: Sequence[str] = ()) -> Iterator[Mapping[str, Any]]:
        """The source record of every example of "train" or "valid", in their order, read anew.

        Args:
            split: which split.
            columns: the fields wanted; of a table only they are read.
        """
        return (record.fields for _, record in self.located_records(split, columns))

    def located_records(
        self, split: str, columns: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> Iterator[tuple[Part, Record]]:
        """`records` with the parts that they lie in; of a table, `optional` are fields that are read where they are."""
        return self._of_examples(split, lambda part, start: part.records(columns, start, optional))

    def conversations(self, split: str, first: int = 0) -> Iterator[Conversation]:
        """The conversation of every example of "train" or "valid" from `first` on, read anew from its source."""
        read = self._of_examples(split, self.stream.documents, first)
        return (Conversation.from_json(document.text) for _, document in read)

    def _of_examples(
        self, split: str, read: Callable[[Part, int], Iterator[Any]], first: int = 0
    ) -> Iterator[tuple[Part, Any]]:
        """What `read` makes of a part, from a record on, without what is of no example, and the part."""
        examples = self.train if split == "train" else self.valid
        parts = self.stream.valid if split == "valid" and self.stream.valid else self.stream.train
        owners, wanted = np.divmod(examples.ids[first:], 1 << PART_BITS)
        for number, part in enumerate(parts):
            indices = iter(wanted[owners == number].tolist())
            index = next(indices, None)
            for record in read(part, index) if index is not None else ():
                if record.index == index:
                    yield part, record
                    index = next(indices, None)
                    if index is None:
                        break

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation of one of its examples' records."""
        text, _ = self.stream.reader.text(record)
        return Conversation.from_json(text)

    def values(self, split: str, field: str) -> list[Any]:
        """A record field (dotted) of every example of a split, in their order: groups of targets, scores to order by.

        Raises:
            InputError: a record without the field.
        """
        found = []
        for number, record in enumerate(self.records(split, [field.split(".")[0]])):
            value: Any = record
            for key in field.split("."):
                if not isinstance(value, Mapping) or key not in value:
                    raise InputError(
                        f"domain {self.name!r}, {split} example {number}: no field {field!r}; the record has "
                        f"{', '.join(record)}"
                    )
                value = value[key]
            found.append(value)
        return found


def store_fault(
    folder: Path, identity: Mapping[str, Any], columns: Sequence[Column], verify: str, progress: bool
) -> str | None:
    """What is wrong with a finished store, in words; None: nothing that was looked at.

    Args:
        folder: of the store.
        identity: what its key stands for.
        columns: of its items.
        verify: how closely its files are looked at; see `checksums.fault`.
        progress: show a bar on stderr.
    """
    try:
        meta = read_meta(folder)
    except InputError as error:
        return str(error)
    if digest({name: meta.get(name) for name in identity}) != digest(identity):
        return f"{folder / 'meta.json'}: of another store"
    sizes = {}
    for split in SPLITS:
        tokens, items = meta[split]["tokens"], meta[split]["documents"]
        sizes[f"{split}.offsets"] = (items + 1) * 8
        for column in columns:
            values = items if column.per_item else tokens
            sizes[f"{split}.{column.name}"] = values * np.dtype(column.dtype).itemsize
    kept = meta.get("checksums")
    if kept is None and verify == "content":
        logger.warning("%s: of an older version, without checksums; delete it to have it built with them", folder)
    if kept is not None and not checksums.are_checksums(kept, sizes):
        return f"{folder / 'meta.json'}: its checksums are not those of its files"
    return checksums.fault({name: folder / name for name in sizes}, sizes, kept, verify, progress=progress)


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of a store's meta.json.

    Raises:
        InputError: it is missing, damaged or none of a store.
    """
    path = folder / "meta.json"
    meta = read_sealed(path)
    if not _is_meta(meta):
        raise InputError(f"{path}: not the meta.json of a store")
    return meta


def _is_meta(meta: Any) -> bool:
    if not isinstance(meta, dict):
        return False
    splits, values = [meta.get(split) for split in SPLITS], meta.get("records_by_value")
    if not all(isinstance(counts, dict) for counts in (*splits, values)):
        return False
    counts = [meta.get(name) for name in RECORD_COUNTS] + [split.get(name) for split in splits for name in SPLIT_COUNTS]
    return all(type(count) is int and count >= 0 for count in (*counts, *values.values()))


def skipped_records(meta: Mapping[str, Any]) -> int:
    """Bad records that were passed over, those without a domain included."""
    return meta["skipped_records"] + meta["unattributed_records"]
