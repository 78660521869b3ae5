"""Local data files: one file or folder a domain, or files whose records say their domain."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dataflex_jax.data.sources.folders import Found, called, find, kind_of, visible
from dataflex_jax.data.sources.formattings import Formatting, formatting
from dataflex_jax.data.sources.names import could_be_data, is_hidden, listed, split_format
from dataflex_jax.data.sources.streams import Stream, field_domains, wanted_domains
from dataflex_jax.errors import InputError
from dataflex_jax.files import expanded

logger = logging.getLogger(__name__)


def local_streams(data: ConfigDict) -> tuple[Stream, ...]:
    """A stream for each domain of the folder `data.root`, or with `data.domain_field` one of all its files.

    Raises:
        InputError: nothing there, an unknown domain, or files that contradict each other.
    """
    root, kind = Path(expanded(data.root)), formatting(data.formatting)
    if not root.exists():
        raise InputError("no such file or folder", option="data.root", value=data.root)
    if data.domain_field is not None:
        return (_field_stream(data, root, kind),)
    if not root.is_dir():
        raise InputError("not a folder; a file needs data.domain_field", option="data.root", value=data.root)
    found, unread = _domains(root, kind, data.domains or ())
    left_out = Found(unread=unread).left_out()
    streams = []
    for name in wanted_domains(data, tuple(found), f"{data.root}{left_out and f' ({left_out})'}"):
        if said := found[name].left_out():
            logger.warning("domain %s: %s", name, said)
        streams.append(
            Stream(kind.parts(found[name].train), kind.parts(found[name].valid), {None: name}, kind.reader(data))
        )
    if left_out and data.domains is None:
        logger.warning("%s: %s", root, left_out)
    return tuple(streams)


def _domains(root: Path, kind: Formatting, wanted: Sequence[str]) -> tuple[dict[str, Found], tuple[str, ...]]:
    """{domain: its files} of a folder with one file, or one sub-folder, a domain; and what else lies there."""
    entries = [entry for entry in visible(root, kind.extensions) if not is_hidden(entry.name)]
    readable = {entry for entry in entries if entry.is_dir() or split_format(entry.name, kind.extensions)}
    splits = {entry.name.split(".")[0]: called(entry, kind.extensions) for entry in readable}
    if all(splits.values()) and len(set(splits.values())) > 1 and splits.keys().isdisjoint(wanted):
        if "train" not in splits.values():
            raise InputError(
                f"{root}: has splits, but no train; give the one to train on as data.root, or name it in data.domains"
            )
        return {Path(os.path.abspath(root)).name or "data": find(root, kind.extensions)}, ()
    domains: dict[str, Found] = {}
    inputs: dict[str, list[str]] = {}
    unread = []
    for entry in entries:
        name, found = _domain(entry, kind) if entry in readable else (entry.name, Found())
        if found.train or found.valid:
            if found.train:
                inputs.setdefault(name, []).append(entry.name)
            domains[name] = domains.get(name, Found()).joined(found)
        elif could_be_data(entry.name):
            unread.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    for name, found in domains.items():
        if len(several := inputs.get(name, ())) > 1:
            raise InputError(
                f"{root}: domain {name!r} has several inputs ({', '.join(several)}); keep one, or use a folder {name}/"
            )
        if not found.train:
            raise InputError(f"{found.valid[0]}: held-out file of domain {name!r}, which has no training file")
    if not domains:
        raise _nothing(root, "NAME.EXT or NAME/*.EXT", kind, Found(unread=tuple(unread)))
    return domains, tuple(unread)


def _domain(entry: Path, kind: Formatting) -> tuple[str, Found]:
    """The domain of a file or folder, and its files."""
    if entry.is_dir():
        return entry.name, find(entry, kind.extensions, above=frozenset([os.path.realpath(entry.parent)]))
    name = split_format(entry.name, kind.extensions)[0].removesuffix(".valid")
    return kind.domain(name), Found()._replace(**{kind_of(entry, kind.extensions): (entry,)})


def _field_stream(data: ConfigDict, root: Path, kind: Formatting) -> Stream:
    if root.is_dir():
        found = find(root, kind.extensions)
        if not found.train:
            raise _nothing(root, "some *.EXT", kind, found)
    elif split_format(root.name, kind.extensions) is None:
        raise InputError(f"{root}: unknown format; accepted are {listed(kind.extensions)}")
    elif not root.is_file():
        raise InputError(f"{root}: a pipe or device, not a file")
    else:
        found = Found(train=(root,))
    if said := found.left_out():
        logger.warning("%s: %s", root, said)
    return Stream(
        kind.parts(found.train), kind.parts(found.valid), field_domains(data), kind.reader(data), data.domain_field
    )


def _nothing(root: Path, expected: str, kind: Formatting, found: Found) -> InputError:
    said = found.left_out()
    reason = f"no data files; expected {expected} with EXT one of {listed(kind.extensions)}"
    return InputError(f"{root}: {reason}{said and '; '}{said}")
