"""LLaMA-Factory's dataset_info.json: a folder's instruction datasets by name, with how to read each.

    {"my_data": {"file_name": "my_data.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
     "alpaca_en": {"hf_hub_url": "llamafactory/alpaca_en", "split": "train"}}

As there: `hf_hub_url` wins over `file_name`, the default formatting is alpaca, and `columns` that are given replace the
optional defaults. An entry that asks for something else than text and its one response is refused by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dataflex_jax.data.sources.files import INSTRUCTION_FORMATS, check_links, split_format
from dataflex_jax.data.sources.hub import dataset_parts
from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.parts import Part, file_parts
from dataflex_jax.data.sources.streams import Stream, wanted_domains
from dataflex_jax.errors import InputError
from dataflex_jax.foreign import read_object

NAME = "dataset_info.json"
_KEYS = ("file_name", "hf_hub_url", "formatting", "subset", "split", "folder", "columns", "tags")
_REFUSED = ("ranking", "num_samples", "script_url", "cloud_file_name")  # LLaMA-Factory has them; other keys it ignores


class Entry(NamedTuple):
    """One dataset: where its description lies, for messages, the folder of its files, and its fields."""

    place: str
    folder: Path
    fields: Mapping[str, Any]


def dataset_info_streams(data: ConfigDict) -> tuple[Stream, ...]:
    """A stream for each dataset that `data.domains` names; where that is None, for each that needs no download.

    Raises:
        InputError: no dataset_info.json, an unknown dataset, or one that cannot be opened.
    """
    entries = read(data.root)
    if data.domains is not None:
        wanted = wanted_domains(data, tuple(entries), f"{data.root}, {NAME}")
    elif not (wanted := local(entries)):
        listed = ", ".join(sorted(entries)) or "none"
        raise InputError(
            f"no dataset of {NAME} is a local file; name the wanted ones in domains; available: {listed}",
            option="data.root",
            value=data.root,
        )
    return tuple(
        Stream(train, valid, {None: name}, reader)
        for name, (train, valid, reader) in ((name, open_entry(entries[name])) for name in wanted)
    )


def read(root: str) -> dict[str, Entry]:
    """All entries by name. `root` is the folder of dataset_info.json, or such a file itself.

    Raises:
        InputError: there is none, or it is not a JSON object of objects.
    """
    path = Path(root).expanduser()
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        reason = f"source 'dataset_info' needs a folder with {NAME}, or such a file"
        raise InputError(reason, option="data.root", value=root)
    entries = read_object(path)
    if not all(isinstance(fields, dict) for fields in entries.values()):
        raise InputError(
            f"{path}: must be an object with an object a dataset, such as {{'name': {{'file_name': ...}}}}"
        )
    return {name: Entry(f"{path}: {name!r}", path.parent, fields) for name, fields in entries.items()}


def local(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """The datasets that need no download, sorted."""
    return tuple(sorted(name for name, entry in entries.items() if "hf_hub_url" not in entry.fields))


def open_entry(entry: Entry) -> tuple[tuple[Part, ...], tuple[Part, ...], ConversationReader]:
    """(training parts, held-out parts, reader) of a dataset.

    Raises:
        InputError: a file that is not there, or an option that is not supported, by name.
    """
    place, fields = entry.place, entry.fields
    reader = _reader(entry)
    split = fields.get("split") or "train"
    if url := fields.get("hf_hub_url"):
        try:
            return *dataset_parts(url, fields.get("subset"), split, fields.get("folder")), reader
        except InputError as error:
            key = {"data.root": "hf_hub_url", "data.hub_split": "split"}[error.option]
            raise InputError(f"{place}: {key}={error.value!r}: {error.reason}") from error
    if not isinstance(fields.get("file_name"), str):
        raise InputError(f"{place}: needs file_name or hf_hub_url; it has {', '.join(fields) or 'nothing'}")
    if split != "train":
        raise InputError(f"{place}: split {split!r}: a file has only the split 'train'")
    path = entry.folder / fields["file_name"]
    files = [path]
    if path.is_dir():
        check_links(children := sorted(path.iterdir()))
        files = [child for child in children if child.is_file() and not child.name.startswith(".")]
    if not files or not files[0].exists():
        raise InputError(f"{place}: file_name {fields['file_name']!r}: no such file or folder, or an empty one")
    for file in files:
        if split_format(file.name, INSTRUCTION_FORMATS) is None:
            raise InputError(f"{place}: {file}: unknown format; accepted are {', '.join(INSTRUCTION_FORMATS)}")
    return file_parts(files), (), reader


def _reader(entry: Entry) -> ConversationReader:
    place, fields = entry.place, entry.fields
    for key in _REFUSED:
        if fields.get(key):
            raise InputError(f"{place}: {key!r} is not supported; accepted: {', '.join(_KEYS)}")
    columns, tags = fields.get("columns"), fields.get("tags")
    for name, value in (("columns", columns), ("tags", tags)):
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{place}: {name} must be an object but is {type(value).__name__}")
    try:
        return ConversationReader.of(fields.get("formatting") or "alpaca", columns, tags)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
