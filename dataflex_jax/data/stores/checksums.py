"""Checksums of the blocks of a file, kept while it is appended to and compared when it is opened.

CRC-32 finds flipped bits, torn writes and blocks of another file; it is no seal against somebody who means harm. As
text a block is 8 hex digits, so that those of 100 GB are 200 kB in a JSON file.
"""

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex_jax.data.stores.hashes import progress_bar

VERIFY = ("size", "sampled", "content")
BLOCK_BYTES = 4 << 20  # of the files that lie in caches too
_DIGITS = 8
_SAMPLED = 4  # blocks beside the first and the last one
_TEXT = re.compile(r"([0-9a-f]{8})*")


class BlockChecksums:
    """The checksums of a file that is appended to; `str()` is their text.

    Args:
        text: those of what is there already.
        size: of it, in bytes.
    """

    def __init__(self, text: str = "", size: int = 0):
        complete = size // BLOCK_BYTES * _DIGITS
        self._complete, self._last = [text[:complete]], int(text[complete:] or "0", 16)
        self._room = BLOCK_BYTES - size % BLOCK_BYTES

    def update(self, data: bytes) -> None:
        """Takes in what is appended."""
        rest = memoryview(data)
        while rest:
            piece, rest = rest[: self._room], rest[self._room :]
            self._last = zlib.crc32(piece, self._last)
            self._room -= len(piece)
            if not self._room:
                self._complete.append(_text(self._last))
                self._last, self._room = 0, BLOCK_BYTES

    def __str__(self) -> str:
        return "".join(self._complete) + (_text(self._last) if self._room < BLOCK_BYTES else "")


def file_checksums(path: Path, size: int) -> str:
    """The checksums of a file's first `size` bytes."""
    return "".join(_text(_block(path, number, size)) for number in range(_blocks(size)))


def are_checksums(value: Any, sizes: Mapping[str, int]) -> bool:
    """Whether a value out of a JSON file is {file: its checksums}, of files of these sizes."""
    return (
        isinstance(value, dict)
        and value.keys() == sizes.keys()
        and all(
            isinstance(value[name], str)
            and _TEXT.fullmatch(value[name])
            and len(value[name]) == _blocks(size) * _DIGITS
            for name, size in sizes.items()
        )
    )


def fault(
    paths: Mapping[str, Path],
    sizes: Mapping[str, int],
    checksums: Mapping[str, str] | None,
    verify: str,
    *,
    longer: bool = False,
    progress: bool = False,
) -> str | None:
    """What is wrong with files, in words; None: nothing that was looked at.

    Args:
        paths: {name: file}.
        sizes: {name: its bytes}.
        checksums: {name: its checksums}; None: of an older version, which kept none.
        verify: "size"; "sampled": also the first, the last and a few other blocks of each file, always the same ones;
            "content": all blocks.
        longer: whether a file may go on behind its size.
        progress: show a bar on stderr.
    """
    for name, size in sizes.items():
        if not paths[name].is_file():
            return f"{paths[name]}: missing"
        found = paths[name].stat().st_size
        if found < size or (found > size and not longer):
            return f"{paths[name]}: has {found:,} bytes, not {size:,}"
    if checksums is None or verify == "size":
        return None
    chosen = [(name, number) for name, size in sizes.items() for number in _chosen(_blocks(size), verify, name)]
    with progress_bar(len(chosen) * BLOCK_BYTES, "verifying", progress) as bar:
        for name, number in chosen:
            kept = checksums[name][number * _DIGITS :][:_DIGITS]
            try:
                found = _block(paths[name], number, sizes[name])
            except OSError as error:  # a broken sector, say, which cannot be trained on either
                return f"{paths[name]}: cannot be read: {error.strerror}"
            if kept != _text(found):
                return f"{paths[name]}: damaged in block {number + 1} of {_blocks(sizes[name])} of 4 MiB"
            bar.update(BLOCK_BYTES)
    return None


def _chosen(blocks: int, verify: str, name: str) -> Sequence[int]:
    if verify == "content" or blocks <= 2 + _SAMPLED:
        return range(blocks)
    return sorted({0, blocks - 1, *random.Random(name).sample(range(1, blocks - 1), _SAMPLED)})


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _block(path: Path, number: int, size: int) -> int:
    first = number * BLOCK_BYTES
    with open(path, "rb") as file:
        file.seek(first)
        return zlib.crc32(file.read(min(BLOCK_BYTES, size - first)))


def _text(checksum: int) -> str:
    return f"{checksum:0{_DIGITS}x}"
