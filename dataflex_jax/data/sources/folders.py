"""Folders of data files: which of them are read, as which split, and what is left out.

Sub-folders called `train`, `validation` (`valid`, `val`, `dev`, `eval`) and `test` are splits, with or without a number
behind, and so are files called so where a `train` lies beside them. `NAME.valid.EXT` is held out anywhere.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataflex_jax.data.sources.names import could_be_data, is_hidden, shown, split_format, split_of
from dataflex_jax.errors import InputError

_NAMED_AT_MOST = 10


class Found(NamedTuple):
    """What lies in a folder.

    Attributes:
        train: files to train on, sorted.
        valid: held-out files, sorted.
        test: files of a test split, which nobody trains on.
        unread: other files that may be data, and sub-folders in which nothing is read ("NAME/"), by their paths in it.
    """

    train: tuple[Path, ...] = ()
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    unread: tuple[str, ...] = ()

    def joined(self, other: "Found") -> "Found":
        """Both, sorted."""
        return Found(*(tuple(sorted(mine + theirs)) for mine, theirs in zip(self, other, strict=True)))

    def left_out(self) -> str:
        """What is not trained on and why, for a message; nothing where all is."""
        said = []
        folders = [name for name in self.unread if name.endswith("/")]
        if files := [name for name in self.unread if not name.endswith("/")]:
            said.append(f"not read, of no known format: {_some(files)}")
        if folders:
            said.append(f"nothing to train on in: {_some(folders)}")
        if self.test:
            said.append(f"not trained on: {len(self.test)} file{'s' * (len(self.test) > 1)} of the test split")
        return "; ".join(said)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(map(shown, names[:_NAMED_AT_MOST])) + (f" and {more} more" if more > 0 else "")


def find(folder: Path, formats: Sequence[str], *, above: frozenset[str] = frozenset()) -> Found:
    """The files of a folder and its sub-folders, links to folders included.

    Args:
        folder: where to look; what is hidden is passed over.
        formats: suffixes that are read.
        above: real paths of the folders that hold it.

    Raises:
        InputError: a folder that cannot be read or holds itself through a link, a link to nothing, or a device or pipe
            that is named like a file.
    """
    found: dict[str, list] = {kind: [] for kind in Found._fields}
    for kind, what in _find(folder, folder, formats, None, above):
        found[kind].append(what)
    return Found(*(tuple(sorted(found[kind])) for kind in Found._fields))


def _find(
    folder: Path, top: Path, formats: Sequence[str], split: str | None, above: frozenset[str]
) -> Iterator[tuple[str, Path | str]]:
    """(field of `Found`, its element) of each file in a folder that belongs to `split` as a whole, if any."""
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"{shown(folder)}: a link to a folder that it lies in; delete the link")
    entries = visible(folder, formats)
    beside_train = any(called(entry, formats) == "train" for entry in entries)
    for entry in entries:
        name = str(entry.relative_to(top))
        if entry.is_dir():
            inner = list(_find(entry, top, formats, split or split_of(entry.name), above | {real}))
            yield from inner if any(kind != "unread" for kind, _ in inner) else [("unread", f"{name}/")]
        elif split_format(entry.name, formats):
            yield kind_of(entry, formats, split or (called(entry, formats) if beside_train else None)), entry
        elif could_be_data(entry.name):
            yield "unread", name


def kind_of(file: Path, formats: Sequence[str], split: str | None = None) -> str:
    """The field of `Found` that a data file belongs to, as part of a split or by its own name."""
    return "valid" if split_format(file.name, formats)[0].endswith(".valid") else split or "train"


def called(entry: Path, formats: Sequence[str]) -> str | None:
    """The split that a data file or folder is called like, if any."""
    if entry.is_dir():
        return split_of(entry.name)
    stem = split_format(entry.name, formats)
    return split_of(stem[0]) if stem else None


def visible(folder: Path, formats: Sequence[str]) -> list[Path]:
    """What lies in a folder and does not begin with a dot, sorted.

    Raises:
        InputError: see `find`.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
    for entry in entries:
        _check(entry, formats)
    return entries


def _check(entry: Path, formats: Sequence[str]) -> None:
    if is_hidden(entry.name):
        return
    if entry.is_symlink() and not entry.exists():
        raise InputError(
            f"{shown(entry)}: a link to {shown(entry.readlink())}, which does not exist; repair or delete the link"
        )
    if split_format(entry.name, formats) and not entry.is_file() and not entry.is_dir():
        raise InputError(f"{shown(entry)}: a pipe or device, not a file; delete or rename it")
