"""Local data files: one file or folder a domain, or files whose records say their domain."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dataflex_jax.data.sources import dataset_info
from dataflex_jax.data.sources.files import check_links, split_format
from dataflex_jax.data.sources.formattings import Formatting, formatting
from dataflex_jax.data.sources.parts import HELD_OUT_NAMES
from dataflex_jax.data.sources.streams import Stream, field_domains, wanted_domains
from dataflex_jax.errors import InputError

logger = logging.getLogger(__name__)


def local_streams(data: ConfigDict) -> tuple[Stream, ...]:
    """A stream for each domain of the folder `data.root`, or with `data.domain_field` one of all its files.

    Raises:
        InputError: nothing there, an unknown domain, or files that contradict each other.
    """
    root, kind = Path(data.root).expanduser(), formatting(data.formatting)
    try:
        if data.domain_field is not None:
            files = _data_files(root, kind.extensions) if root.is_dir() else [root]
            return (_field_stream(data, root, files, kind),)
        found = _local_domains(root, kind)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", option="data.root", value=data.root) from error
    streams = []
    for name in wanted_domains(data, tuple(found), data.root):
        train, valid = found[name]
        streams.append(Stream(kind.parts(train), kind.parts(valid), {None: name}, kind.reader(data)))
    return tuple(streams)


def _data_files(folder: Path, extensions: Sequence[str]) -> list[Path]:
    shown = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    check_links(shown)
    return [p for p in shown if split_format(p.name, extensions) and p.name != dataset_info.NAME and p.is_file()]


def _is_held_out(path: Path, extensions: Sequence[str]) -> bool:
    return split_format(path.name, extensions)[0].endswith(".valid")


def _local_domains(root: Path, kind: Formatting) -> dict[str, tuple[list[Path], list[Path]]]:
    """{domain: (training files, held-out files)} of a folder with one file, or one sub-folder, a domain."""
    inputs: dict[str, list[Path]] = {}
    train: dict[str, list[Path]] = {}
    valid: dict[str, list[Path]] = {}
    extensions = kind.extensions
    entries = sorted(root.iterdir())
    check_links(entries)
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith((".", "_")):
            name, files = entry.name, _data_files(entry, extensions)
        elif split_format(entry.name, extensions) and entry.name != dataset_info.NAME and entry.is_file():
            name, files = kind.domain(split_format(entry.name, extensions)[0].removesuffix(".valid")), [entry]
        else:
            continue
        held_out = [path for path in files if _is_held_out(path, extensions)]
        training = [path for path in files if path not in held_out]
        if training:
            inputs.setdefault(name, []).append(entry)
            train.setdefault(name, []).extend(training)
        if held_out:
            valid.setdefault(name, []).extend(held_out)
    for name, several in inputs.items():
        if len(several) > 1:
            listed = ", ".join(entry.name for entry in several)
            raise InputError(
                f"{root}: domain {name!r} has several inputs ({listed}); keep one, or use a folder {name}/"
            )
    for name, paths in valid.items():
        if name not in train:
            raise InputError(f"{paths[0]}: held-out file of domain {name!r}, which has no training file")
    if not train:
        accepted = ", ".join(extensions)
        raise InputError(f"{root}: no data files; expected NAME.EXT or NAME/*.EXT with EXT one of {accepted}")
    return {name: (train[name], valid.get(name, [])) for name in train}


def _field_stream(data: ConfigDict, root: Path, files: list[Path], kind: Formatting) -> Stream:
    if not root.exists():
        raise InputError("no such file or folder", option="data.root", value=data.root)
    train, valid, tests = [], [], 0
    for path in files:
        if split_format(path.name, kind.extensions) is None:
            raise InputError(f"{path}: unknown format; accepted are {', '.join(kind.extensions)}")
        folders = path.relative_to(root).parts[:-1]
        if _is_held_out(path, kind.extensions) or any(folder in HELD_OUT_NAMES for folder in folders):
            valid.append(path)
        elif "test" in folders:
            tests += 1
        else:
            train.append(path)
    if tests:
        logger.warning("%s: %d files in folders named test are left out of training", root, tests)
    if not train:
        raise InputError(f"{root}: no data files; expected some *.EXT with EXT one of {', '.join(kind.extensions)}")
    domains, reader = field_domains(data), kind.reader(data)
    return Stream(kind.parts(train), kind.parts(valid), domains, reader, data.domain_field)
