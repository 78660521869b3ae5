"""What the names of data files and folders say: format, compression, and split."""

import os
import re
from collections.abc import Sequence

_COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
_LINES = tuple(name + packed for name in (".jsonl", ".ndjson") for packed in _COMPRESSED)
_JSON = tuple(".json" + packed for packed in _COMPRESSED)
FORMATS = (*_LINES, *_JSON, ".parquet", ".txt")
INSTRUCTION_FORMATS = (*_LINES, *_JSON, ".parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")  # the hub's "train-00000-of-00002.parquet", or "train_0.jsonl"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# What lies beside data and nobody expects to be read.
_BESIDE = re.compile(
    r"(?i)(read-?me|licen[cs]e|copying|notice|authors|citation|change-?log|makefile|dockerfile|md5sums?|sha\d+sums?)(\..*)?"
    r"|.*\.(md|rst|bib|cff|ya?ml|toml|cfg|ini|py|pyc|ipynb|sh|log|pdf|png|jpe?g|svg|md5|sha\d+)"
)

_NOT_SHOWN = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data by convention: `.cache`, `_SUCCESS`."""
    return name.startswith((".", "_"))


def split_format(name: str, formats: Sequence[str] = FORMATS) -> tuple[str, str] | None:
    """`"a.valid.JSONL.gz"` -> `("a.valid", ".jsonl.gz")`; None for a hidden file or one of none of `formats`."""
    if is_hidden(name) or name in DESCRIPTIONS:
        return None
    for suffix in sorted(formats, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], suffix
    return None


def could_be_data(name: str) -> bool:
    """Whether somebody may expect a file of this name to be read."""
    return not is_hidden(name) and name not in DESCRIPTIONS and not _BESIDE.fullmatch(name)


def split_of(stem: str) -> str | None:
    """ "train", "valid" or "test" where a folder, or a file without its suffix, is called like a split; else None."""
    return SPLITS.get(_SHARD.sub("", stem).lower())


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: on one line, whatever its bytes are."""
    return _NOT_SHOWN.sub(lambda match: repr(match[0])[1:-1], os.fspath(path))


def listed(formats: Sequence[str]) -> str:
    """`formats` for a message: `.json[.gz|.zst], .parquet`."""
    plain = [suffix for suffix in formats if suffix.count(".") == 1]
    packed = {suffix: [f[len(suffix) :] for f in formats if f.startswith(suffix + ".")] for suffix in plain}
    return ", ".join(suffix + (f"[{'|'.join(packed[suffix])}]" if packed[suffix] else "") for suffix in plain)
