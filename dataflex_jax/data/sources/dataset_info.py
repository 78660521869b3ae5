"""LLaMA-Factory's dataset_info.json: a folder's instruction datasets by name, with how to read each.

    {"my_data": {"file_name": "my_data.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
     "alpaca_en": {"hf_hub_url": "llamafactory/alpaca_en", "split": "train", "num_samples": 1000}}

As there: `hf_hub_url` wins over `file_name`, the default formatting is alpaca, and `columns` that are given replace the
optional defaults. An entry that asks for something else than text and its one response is refused by name, or, where
`data.domains` does not choose among the entries, listed and passed over.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.sources.folders import find
from dataflex_jax.data.sources.hub import dataset_parts
from dataflex_jax.data.sources.instruct import COLUMNS, ConversationReader
from dataflex_jax.data.sources.names import DESCRIPTIONS, INSTRUCTION_FORMATS, listed, split_format
from dataflex_jax.data.sources.parts import Part, file_parts, sampled
from dataflex_jax.data.sources.streams import Stream, type_name, wanted_domains
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import expanded
from dataflex_jax.foreign import read_object

logger = logging.getLogger(__name__)

NAME = DESCRIPTIONS[0]
_KEYS = {  # what is read of an entry, with its type
    "file_name": str,
    "hf_hub_url": str,
    "formatting": str,
    "subset": str,
    "split": str,
    "folder": str,
    "num_samples": int,
    "columns": dict,
    "tags": dict,
}
_REFUSED = ("ranking", "script_url", "cloud_file_name")  # LLaMA-Factory has them; other keys it ignores
_REFUSED_COLUMNS = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
_ACCEPTED = listed(INSTRUCTION_FORMATS)
_NAMED_AT_MOST = 20


class Entry(NamedTuple):
    """One dataset: where its description lies, for messages, the folder of its files, and its fields."""

    place: str
    folder: Path
    fields: Any

    @property
    def on_the_hub(self) -> bool:
        """Whether it has to be downloaded."""
        return isinstance(self.fields, Mapping) and bool(self.fields.get("hf_hub_url"))


def dataset_info_streams(data: ConfigDict) -> tuple[Stream, ...]:
    """A stream for each dataset that `data.domains` names; where that is None, for each usable one on this machine.

    Raises:
        InputError: no dataset_info.json, an unknown dataset, or one that cannot be opened.
    """
    entries = read(data.root)
    if data.domains is None:
        return _usable_streams(entries, data.root)
    wanted = wanted_domains(data, tuple(entries), f"{data.root}, {NAME}")
    return tuple(_stream(name, entries[name]) for name in wanted)


def read(root: str) -> dict[str, Entry]:
    """All entries by name. `root` is the folder of dataset_info.json, or such a file itself.

    Raises:
        InputError: there is none, or it is not a JSON object.
    """
    path = Path(expanded(root))
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        reason = f"source 'dataset_info' needs a folder with {NAME}, or such a file"
        raise InputError(reason, option="data.root", value=root)
    return {name: Entry(f"{path}: {name!r}", path.parent, fields) for name, fields in read_object(path).items()}


def _usable_streams(entries: Mapping[str, Entry], root: str) -> tuple[Stream, ...]:
    streams, reasons = [], {}
    for name, entry in sorted(entries.items()):
        try:
            if entry.on_the_hub:
                raise InputError(f"{entry.place}: on the hub, read where data.domains names it")
            streams.append(_stream(name, entry))
        except InputError as error:
            reasons[name] = str(error).removeprefix(f"{entry.place}: ")
    left_out = _listed(reasons)
    if not streams:
        reason = f"no dataset of {NAME} is usable here without being named in data.domains: {left_out or 'it is empty'}"
        raise InputError(reason, option="data.root", value=root)
    if reasons:
        logger.warning("%s, %s: not read, since data.domains names none: %s", root, NAME, left_out)
    return tuple(streams)


def _listed(reasons: Mapping[str, str]) -> str:
    """The datasets by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    said = []
    for reason, those in names.items():
        more = f" and {len(those) - _NAMED_AT_MOST} more" if len(those) > _NAMED_AT_MOST else ""
        said.append(f"{', '.join(those[:_NAMED_AT_MOST])}{more} ({reason})")
    return "; ".join(said)


def _stream(name: str, entry: Entry) -> Stream:
    train, valid, reader = open_entry(entry)
    return Stream(train, valid, {None: name}, reader)


def open_entry(entry: Entry) -> tuple[tuple[Part, ...], tuple[Part, ...], ConversationReader]:
    """(training parts, held-out parts, reader) of a dataset.

    Raises:
        InputError: a file that is not there, or an option that is not supported, by name.
    """
    place, fields = entry.place, entry.fields
    _check_types(place, fields)
    reader = _reader(entry)
    split, count = fields.get("split") or "train", fields.get("num_samples")
    if entry.on_the_hub:
        url = fields["hf_hub_url"]
        try:
            train, valid = dataset_parts(url, fields.get("subset"), split, fields.get("folder"))
        except InputError as error:
            key = {"data.root": "hf_hub_url", "data.hub_split": "split"}.get(error.option)
            reason = f"{key}={error.value!r}: {error.reason}" if key else error.reason
            raise InputError(f"{place}: {reason}") from error
    else:
        if split != "train":
            raise InputError(f"{place}: split {split!r}: a file has only the split 'train'")
        train, valid = map(file_parts, _files(entry))
    return train if count is None else sampled(train, reader.columns, count), valid, reader


def _check_types(place: str, fields: Any) -> None:
    if not isinstance(fields, dict):
        raise InputError(f"{place}: must be an object, such as {{'file_name': ...}}, but is {type_name(fields)}")
    for key, kind in _KEYS.items():
        value = fields.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            wanted = {str: "a string", int: "an integer", dict: "an object"}[kind]
            raise InputError(f"{place}: {key} must be {wanted} but is {type_name(value)}")
    if fields.get("num_samples") is not None and fields["num_samples"] < 1:
        raise InputError(f"{place}: num_samples is {fields['num_samples']}; must be at least 1")
    for key in _REFUSED:
        if fields.get(key):
            raise InputError(f"{place}: {key!r} is not supported; accepted: {', '.join(_KEYS)}")
    if not fields.get("file_name") and not fields.get("hf_hub_url"):
        raise InputError(f"{place}: needs file_name or hf_hub_url; it has {one_line(', '.join(fields) or 'nothing')}")


def _files(entry: Entry) -> tuple[Sequence[Path], Sequence[Path]]:
    """(training files, held-out files) of a dataset on this machine."""
    name = entry.fields["file_name"]
    place, path = f"{entry.place}: file_name {name!r}", Path(os.path.normpath(entry.folder / name))
    if not path.is_relative_to(os.path.normpath(entry.folder)):
        raise InputError(f"{place} leaves the folder of {NAME}; link or copy the file into it")
    if path.is_dir():
        found = find(path, INSTRUCTION_FORMATS)
        if found.unread or not found.train:
            raise InputError(f"{place}: {found.left_out() or 'nothing to train on'}; accepted are {_ACCEPTED}")
        if found.test:
            logger.warning("%s: %s", place, found.left_out())
        return found.train, found.valid
    if not path.exists():
        raise InputError(f"{place}: no such file or folder")
    if split_format(path.name, INSTRUCTION_FORMATS) is None:
        raise InputError(f"{place}: unknown format; accepted are {_ACCEPTED}")
    if not path.is_file():
        raise InputError(f"{place}: a pipe or device, not a file")
    return [path], []


def _reader(entry: Entry) -> ConversationReader:
    place, formatting = entry.place, entry.fields.get("formatting") or "alpaca"
    columns, tags = entry.fields.get("columns"), entry.fields.get("tags")
    for name in _REFUSED_COLUMNS:
        if (columns or {}).get(name):
            raise InputError(f"{place}: column {name!r} is not supported: examples are texts with one response each")
    known = COLUMNS.get(formatting, ())
    if columns is not None and "prompt" in known and columns.get("prompt") and not columns.get("response"):
        raise InputError(
            f"{place}: column 'response' is missing: a prompt alone is text for pretraining, which data.source='local' "
            f"reads with data.text_field={columns['prompt']!r}"
        )
    if columns is not None and (extra := [name for name in columns if name not in known]):
        logger.warning("%s: columns that are not known are ignored: %s", place, one_line(", ".join(extra)))
        columns = {name: field for name, field in columns.items() if name in known}
    try:
        return ConversationReader.of(formatting, columns, tags)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
