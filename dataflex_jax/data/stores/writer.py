"""Writing one domain's store so that a kill at any moment costs a few seconds and changes nothing in the result.

A store under construction is a folder `NAME-KEY.partial` that holds `store/` (the files to be), `progress.json` and,
where the domain has its own held-out files, the digests of their texts. Every few seconds the data files are fsynced
and then `progress.json` is replaced: it says how long each file is, its checksums and which record comes next. After a
kill the files are cut back to these lengths and the pass goes on from that record, so the finished store is the same
byte for byte.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataflex_jax.data.stores.flat_files import Committed, FlatFiles
from dataflex_jax.errors import InputError
from dataflex_jax.files import read_sealed, replace_sealed

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
SPLIT_COUNTS = ("tokens", "documents", "bytes", "targets")
# What meta.json calls the numbers of records, and what kind of record each one counts.
RECORD_COUNTS = {
    "skipped_records": "bad",
    "unattributed_records": "unattributed",
    "empty_documents": "empty",
    "untargeted_examples": "untargeted",
    "held_out_duplicates": "duplicate",
}
DIGEST_BYTES = 16


class Column(NamedTuple):
    """One array of a store: values of `dtype` in the file SPLIT.NAME, one a token or (`per_item`) one an item."""

    name: str
    dtype: str
    per_item: bool = False


class Item(NamedTuple):
    """A document or example: its part of each column, and what it adds to the counts of its split ("bytes", ...)."""

    columns: tuple[np.ndarray, ...]
    counts: dict[str, int]


class Position(NamedTuple):
    """The record that comes next: held-out parts (phase 0) are read before training parts (phase 1)."""

    phase: int
    part: int
    index: int


START = Position(0, 0, 0)


@dataclasses.dataclass
class _Progress:
    """What is safely on disk: the next record, the files, and counts of records by kind."""

    position: Position = START
    consumed: int = 0  # bytes of the stream before `position`
    committed: Committed = dataclasses.field(default_factory=Committed)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    values: dict[str, int] = dataclasses.field(default_factory=dict)  # records of the stream by domain value

    @classmethod
    def read(cls, path: Path, files: dict[str, Path], verify: str) -> "_Progress":
        """What progress.json says.

        Raises:
            InputError: it is damaged or foreign, or the files are not as it says.
        """
        saved = read_sealed(path)
        match saved:
            case {"position": [int(), int(), int()], "consumed": int(), "counts": dict(), "values": dict()}:
                numbers = (*saved["position"], *saved["counts"].values(), *saved["values"].values())
                known = all(type(number) is int and number >= 0 for number in numbers)
            case _:
                known = False
        if not known:
            raise InputError(f"{path}: not the progress of a build")
        committed = Committed.found(path, files, saved.get("sizes"), saved.get("checksums"), verify)
        return cls(Position(*saved["position"]), saved["consumed"], committed, saved["counts"], saved["values"])

    def write(self, path: Path) -> None:
        """Makes it what the next build goes on from."""
        saved = {name: getattr(self, name) for name in ("position", "consumed", "counts", "values")}
        replace_sealed(path, saved | dataclasses.asdict(self.committed))


class DomainWriter:
    """One domain's store under construction (see the module docstring)."""

    def __init__(
        self,
        folder: Path,
        name: str,
        columns: Sequence[Column],
        description: dict[str, Any],
        *,
        keep_skipped: bool,
        verify: str,
    ):
        """Opens what an interrupted build left, cut back to its last commit, or starts afresh.

        Args:
            folder: where the finished store will lie.
            name: of the domain, for messages.
            columns: of the items; the tokens first.
            description: goes into meta.json as it is.
            keep_skipped: whether a build that skipped bad records may be continued.
            verify: how closely its files are looked at; see `checksums.fault`.
        """
        self.folder, self.name, self._columns = folder, name, tuple(columns)
        self._description = description
        self._partial = partial_folder(folder)
        paths = {
            f"{split}.{kind}": self._partial / "store" / f"{split}.{kind}"
            for split in SPLITS
            for kind in (*(column.name for column in columns), "offsets")
        } | {"digests": self._partial / "digests"}
        self._digests = paths["digests"]
        progress = self._kept_progress(paths, verify)
        if progress is not None and not keep_skipped and _skipped(progress.counts):
            progress = None
        if progress is None:
            shutil.rmtree(self._partial, ignore_errors=True)
            (self._partial / "store").mkdir(parents=True)
        self.progress = progress or _Progress()
        self._files = FlatFiles(paths, self.progress.committed)
        token_size = np.dtype(columns[0].dtype).itemsize
        self._tokens = {split: self._files.size(f"{split}.{columns[0].name}") // token_size for split in SPLITS}
        if progress is None:
            for split in SPLITS:
                self._files.append(f"{split}.offsets", np.zeros(1, np.int64).tobytes())

    def _kept_progress(self, paths: dict[str, Path], verify: str) -> _Progress | None:
        path = self._partial / "progress.json"
        if not path.is_file():
            return None
        try:
            return _Progress.read(path, paths, verify)
        except InputError as error:
            logger.warning("the interrupted build cannot be continued and starts again: %s", error)
            return None

    def digests(self) -> set[bytes]:
        """Digests of the held-out texts written so far."""
        content = self._digests.read_bytes()
        return {content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES)}

    def append(self, split: str, items: list[Item], digests: list[bytes]) -> None:
        """Appends items to a split."""
        lengths = np.array([len(item.columns[0]) for item in items], np.int64)
        for i, column in enumerate(self._columns):
            values = np.concatenate([item.columns[i] for item in items])
            self._files.append(f"{split}.{column.name}", values.tobytes())
        self._files.append(f"{split}.offsets", (self._tokens[split] + np.cumsum(lengths)).tobytes())
        self._files.append("digests", b"".join(digests))
        self._tokens[split] += int(lengths.sum())
        self.count(f"{split}_documents", len(items))
        for kind in items[0].counts:
            self.count(f"{split}_{kind}", sum(item.counts[kind] for item in items))

    def count(self, kind: str, amount: int) -> None:
        """Adds to one of the counts that meta.json will hold."""
        self.progress.counts[kind] = self.progress.counts.get(kind, 0) + amount

    def commit(self, position: Position, consumed: int, values: dict[str, int]) -> None:
        """Makes everything so far safe: after a kill the build goes on from `position`."""
        self.progress.committed = self._files.commit()
        self.progress.position, self.progress.consumed, self.progress.values = position, consumed, dict(values)
        self.progress.write(self._partial / "progress.json")
        _sync_folder(self._partial)

    def finish(self) -> None:
        """Writes meta.json and moves the store to its place.

        Raises:
            InputError: the domain has no training document.
        """
        counts = self.progress.counts
        if not counts.get("train_documents"):
            raise InputError(self._why_empty())
        self.close()
        store = self._partial / "store"
        meta = {
            **self._description,
            "dtype": self._columns[0].dtype,
            **{
                split: {kind: counts.get(f"{split}_{kind}", 0) for kind in SPLIT_COUNTS}
                | {"tokens": self._tokens[split]}
                for split in SPLITS
            },
            **{count: counts.get(kind, 0) for count, kind in RECORD_COUNTS.items()},
            "records_by_value": self.progress.values,
            "checksums": {name: text for name, text in self.progress.committed.checksums.items() if name != "digests"},
        }
        # Not in the store's own folder, where a kill might leave half a file.
        replace_sealed(self._partial / "meta.json", meta, indent=2, ensure_ascii=False)
        os.replace(self._partial / "meta.json", store / "meta.json")
        _sync_folder(store)
        os.rename(store, self.folder)
        _sync_folder(self.folder.parent)
        shutil.rmtree(self._partial, ignore_errors=True)

    def _why_empty(self) -> str:
        counts, reasons = self.progress.counts, []
        if skipped := _skipped(counts):
            reasons.append(f"{skipped} records were skipped as bad (data.on_bad_record='raise' shows the first)")
        if counts.get("untargeted"):
            reasons.append(f"{counts['untargeted']} examples have no target, or none within data.cutoff_len")
        if counts.get("empty"):
            reasons.append(f"{counts['empty']} documents are empty")
        if held_out := counts.get("valid_documents", 0) + counts.get("duplicate", 0):
            reasons.append(f"{held_out} are held out")
        if self.progress.values:
            reasons.append("values of domain_field found: " + ", ".join(map(repr, sorted(self.progress.values))))
        return f"domain {self.name!r} has no training documents" + ("; " if reasons else "") + "; ".join(reasons)

    def close(self) -> None:
        """Closes the files; what was not committed is dropped by the next build."""
        self._files.close()


def partial_folder(folder: Path) -> Path:
    """The folder of the store under construction that is to become `folder`."""
    return folder.with_name(folder.name + ".partial")


def _skipped(counts: dict[str, int]) -> int:
    return counts.get("bad", 0) + counts.get("unattributed", 0)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
