"""A small corpus that every machine has: six clearly different domains read from the running Python installation.

Nothing is downloaded, so a first run needs no network and no files. The text depends on the installed Python version
and packages, and on nothing else: files are taken in sorted order, cut into pieces of a few kilobytes and freed of
duplicates.
"""

import ast
import functools
import hashlib
import importlib.metadata
import itertools
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dataflex_jax.errors import InputError

DOMAIN_BYTES = 600_000
_PIECE_CHARACTERS = 6_000
_MIN_CHARACTERS = 200
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_LICENSE_NAME = re.compile(r"(licen[cs]e|copying|notice|authors)", re.IGNORECASE)
_HEADING = re.compile(r"^(?=\S[^\n]*\n[*=~^\"-]{3,}$)", re.MULTILINE)


def records(domain: str) -> tuple[dict[str, str], ...]:
    """`documents` as records with the field "text"."""
    return tuple({"text": text} for text in documents(domain))


def documents(domain: str) -> tuple[str, ...]:
    """The documents of one of `DOMAINS`, in a fixed order, at most about `DOMAIN_BYTES` of UTF-8 in all.

    Raises:
        InputError: this Python installation lacks the files (a stripped-down one without sources, say).
    """
    chosen, seen, size = [], set(), 0
    for piece in itertools.chain.from_iterable(map(_pieces, DOMAINS[domain]())):
        encoded = piece.encode(errors="replace")
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        if len(piece) < _MIN_CHARACTERS or digest in seen:
            continue
        seen.add(digest)
        chosen.append(encoded.decode())
        size += len(encoded)
        if size >= DOMAIN_BYTES:
            break
    if not chosen:
        raise InputError(
            f"this Python installation has no text for domain {domain!r}; leave it out of domains or take source "
            "'local'",
            option="data.source",
            value="builtin",
        )
    return tuple(chosen)


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text at blank lines into pieces of about `_PIECE_CHARACTERS`."""
    paragraphs: list[str] = []
    for paragraph in text.replace("\r\n", "\n").strip().split("\n\n"):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= _PIECE_CHARACTERS:
            yield "\n\n".join(paragraphs)
            paragraphs = []
    yield "\n\n".join(paragraphs)


def _readable(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")


@functools.cache
def standard_library() -> tuple[Path, ...]:
    """The source files of the standard library, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.glob("*.py")) + sorted(root.glob("*/*.py"))
    return tuple(path for path in paths if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts))


def _code() -> Iterator[str]:
    """Every second module of the standard library (the others give the docstrings, so the domains share no text)."""
    return _readable(standard_library()[::2])


def _docstrings() -> Iterator[str]:
    for path in standard_library()[1::2]:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield "\n\n".join(text for text in texts if text)


def _headers() -> Iterator[str]:
    roots = (Path(sysconfig.get_path("include")), Path(np.get_include()))
    return _readable(path for root in roots for path in sorted(root.rglob("*.h")))


def _distributions() -> list[importlib.metadata.Distribution]:
    found = {(d.metadata["Name"] or "").lower(): d for d in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found)]


def _licenses() -> Iterator[str]:
    for distribution in _distributions():
        files = sorted(distribution.files or (), key=str)
        chosen = (f for f in files if ".dist-info" in str(f) and _LICENSE_NAME.search(f.name))
        yield from _readable(path for f in chosen if (path := Path(distribution.locate_file(f))).is_file())


def _packages() -> Iterator[str]:
    for distribution in _distributions():
        yield distribution.metadata.get_payload() or distribution.metadata["Description"] or ""


def reference() -> Iterator[str]:
    """The sections of the language reference that `help()` shows, title first."""
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions package it apart; the caller reports an empty domain
        return
    for name in sorted(topics.topics):
        yield from _HEADING.split(topics.topics[name])


DOMAINS = {
    "code": _code,
    "docstrings": _docstrings,
    "headers": _headers,
    "licenses": _licenses,
    "packages": _packages,
    "reference": reference,
}
