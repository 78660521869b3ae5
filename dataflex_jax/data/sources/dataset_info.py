"""LLaMA-Factory's dataset_info.json: a folder's instruction datasets by name, with how to read each.

    {"my_data": {"file_name": "my_data.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
     "alpaca_en": {"hf_hub_url": "llamafactory/alpaca_en", "split": "train"}}

As there: `hf_hub_url` wins over `file_name`, the default formatting is alpaca, and `columns` that are given replace the
optional defaults. An entry that asks for something else than text and its one response is refused by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dataflex_jax.data.sources.files import INSTRUCTION_FORMATS, check_links, split_format
from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.data.sources.parts import Part, dataset_parts, file_parts
from dataflex_jax.errors import InputError
from dataflex_jax.files import one_line

NAME = "dataset_info.json"
_KEYS = ("file_name", "hf_hub_url", "formatting", "subset", "split", "folder", "columns", "tags")
_REFUSED = ("ranking", "num_samples", "script_url", "cloud_file_name")  # LLaMA-Factory has them; other keys it ignores


class Entry(NamedTuple):
    """One dataset: where its description lies, for messages, the folder of its files, and its fields."""

    place: str
    folder: Path
    fields: Mapping[str, Any]


def read(root: str) -> dict[str, Entry]:
    """All entries by name. `root` is the folder of dataset_info.json, or such a file itself.

    Raises:
        InputError: there is none, or it is not a JSON object of objects.
    """
    path = Path(root or "").expanduser()
    path = path / NAME if path.is_dir() else path
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"data.root={root}: data.source='dataset_info' needs a folder with {NAME}, or such a file: {error.strerror}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(entries, dict) or not all(isinstance(fields, dict) for fields in entries.values()):
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
        options = {"root_option": f"{place}: hf_hub_url", "split_option": f"{place}: split"}
        return *dataset_parts(url, fields.get("subset"), split, fields.get("folder"), **options), reader
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
