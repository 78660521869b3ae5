"""Digests of whole files."""

import hashlib
import json
from pathlib import Path

import tqdm

from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_json


class FileHashes:
    """Digests of whole files, remembered by path, size and modification time so that a restart only stats."""

    def __init__(self, path: Path, progress: bool):
        self._path, self._progress = path, progress
        self._known = json.loads(path.read_text()) if path.is_file() else {}
        self._changed = False

    def __call__(self, file: Path) -> str:
        """The digest of a file. Raises `InputError` where it cannot be read."""
        try:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            known = self._known.get(str(file.resolve()))
            if known and known[:2] == stamp:
                return known[2]
            with (
                open(file, "rb", buffering=0) as raw,
                progress_bar(status.st_size, f"hashing {file.name}", self._progress) as bar,
            ):
                content = hashlib.blake2b(digest_size=16)
                while block := raw.read(1 << 22):
                    content.update(block)
                    bar.update(len(block))
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        self._known[str(file.resolve())] = [*stamp, content.hexdigest()]
        self._changed = True
        return content.hexdigest()

    def save(self) -> None:
        """Writes what was learnt, for the next start."""
        if self._changed:
            replace_json(self._path, self._known)


def progress_bar(total: int, description: str, progress: bool) -> tqdm.tqdm:
    """A bar in bytes with rate and remaining time; work of under half a second shows none."""
    return tqdm.tqdm(
        total=total, desc=description, unit="B", unit_scale=True, disable=not progress, delay=0.5, leave=False
    )
