"""Flat files that grow together so that a kill at any moment costs what came after the last commit, and nothing else.

They are written as files and never through a memory map, where a full disk would be a signal instead of an error.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_jax.data.stores.checksums import BlockChecksums, are_checksums, fault, file_checksums
from dataflex_jax.errors import InputError


@dataclasses.dataclass
class Committed:
    """What of some files is safely on disk: {name: bytes} and {name: checksums of these}, where they were kept."""

    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def found(cls, said: Path, paths: Mapping[str, Path], sizes: Any, checksums: Any, verify: str) -> "Committed":
        """What is there, of what a JSON file says.

        Args:
            said: the JSON file, for messages.
            paths: {name: file}.
            sizes: what it says of their sizes.
            checksums: of their checksums; None: an older version wrote it, without any.
            verify: as for `checksums.fault`.

        Raises:
            InputError: it says something else, or a file is not as it says; names which.
        """
        known = isinstance(sizes, dict) and sizes.keys() <= paths.keys()
        if not known or not all(type(size) is int and size >= 0 for size in sizes.values()):
            raise InputError(f"{said}: not the sizes of these files")
        if checksums is not None and not are_checksums(checksums, sizes):
            raise InputError(f"{said}: not the checksums of these files")
        if problem := fault(paths, sizes, checksums, verify, longer=True):
            raise InputError(problem)
        return cls(sizes, checksums or {})


class FlatFiles:
    """Files that are open for appending.

    Args:
        paths: {name: file}, in folders that are there.
        committed: what to go on from; what the files hold behind it is dropped.
    """

    def __init__(self, paths: Mapping[str, Path], committed: Committed):
        self._open_files = contextlib.ExitStack()
        self._files, self._checksums = {}, {}
        for name, path in paths.items():
            size = committed.sizes.get(name, 0)
            file = self._files[name] = self._open_files.enter_context(path.open("ab"))
            file.truncate(size)
            file.seek(0, os.SEEK_END)
            kept = committed.checksums.get(name)
            self._checksums[name] = BlockChecksums(file_checksums(path, size) if kept is None else kept, size)

    def size(self, name: str) -> int:
        """Bytes of a file, those not committed included."""
        return self._files[name].tell()

    def append(self, name: str, data: bytes) -> None:
        """Appends to a file."""
        self._files[name].write(data)
        self._checksums[name].update(data)

    def commit(self) -> Committed:
        """Waits until everything so far is on disk.

        Raises:
            OSError: no room.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return Committed(
            {name: file.tell() for name, file in self._files.items()},
            {name: str(checksums) for name, checksums in self._checksums.items()},
        )

    def close(self) -> None:
        """Closes the files; what was not committed is dropped when they are opened again."""
        # On a full disk the flush of uncommitted bytes fails again; the first error is already on its way up.
        with contextlib.suppress(OSError):
            self._open_files.close()
