"""What befalls the files of a cache: flipped bits, cuts, a full disk, a read-only one."""

import os
import random
from pathlib import Path

import filelock
import pytest

from dataflex_jax.data.stores import flat_files

FOREIGN = (b"", b"{", b"[]", b"{}", b"null", b'{"rows": 1}', b'{"a": [1, 2, "b"]}', b"\xff\xfe\x00", b"[" * 2000)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages one file of a folder and says how."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"))
    content, kind = path.read_bytes(), rng.choice(("flip", "flip", "cut", "delete", "append", "zero", "foreign"))
    if kind == "delete":
        path.unlink()
    elif kind == "foreign" or not content:
        path.write_bytes(rng.choice(FOREIGN))
    elif kind == "flip":
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "zero":
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes(len(content) - at))
    else:
        path.write_bytes(content + rng.choice((b"\0", b"}", content)))
    return f"{kind} {path.relative_to(folder)}"


def fill_disk(patch: pytest.MonkeyPatch, after: int) -> None:
    """Lets the flat files have room for so many calls of fsync."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    patch.setattr(flat_files.os, "fsync", full)


def make_read_only(patch: pytest.MonkeyPatch) -> None:
    """What a process that may write nowhere sees; root may do so, whatever the permissions are."""

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    patch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    patch.setattr(filelock.FileLock, "acquire", refused)
