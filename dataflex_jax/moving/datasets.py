"""LLaMA-Factory's fields of the data: which datasets, their form, and what they are compared with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex_jax.errors import InputError
from dataflex_jax.foreign import read_object
from dataflex_jax.moving.draft import Draft, Given

_INFO = "dataset_info.json"
_TEMPLATES = {name: name for name in ("qwen", "llama3", "mistral", "alpaca")}
_OF_TOKENIZER = ("qwen3", "qwen3_nothink", "qwen3_5", "qwen3_5_nothink")


def datasets(given: Given, draft: Draft, stage: str) -> tuple[str, ...]:
    """The training data; returns the names of the domains."""
    names = given.names("dataset")
    if not names:
        given.refuse("dataset", "names of datasets are expected")
    root = _root(given, draft)
    if stage == "pt":
        names = _documents(given, draft, root, names)
    else:
        _conversations(given, draft, root)
        draft.set(data__domains=names)
    given.one_of("mix_strategy", {"concat": "concat"}, "concat")
    draft.set(data__max_samples=given.integer("max_samples"))
    share = given.number("val_size")
    if share is not None and share >= 1:
        given.refuse("val_size", "a share below 1 is expected, such as 0.01, for documents are held out by hash")
    draft.set(data__valid_fraction=share or None)
    if given.flag("group_by_length"):
        reason = "rows come in the order of the shuffle; a batch is padded to the smallest of config.data.buckets"
        draft.note(given.place("group_by_length"), reason)
    for name in ("length_column_name", "train_sampling_strategy"):
        given.raw(name)
    return names


def targets(given: Given, draft: Draft, wanted_by: Sequence[str]) -> None:
    """What the policies compare with: `eval_dataset`, or else the held-out rows of the training data.

    Args:
        given: the file.
        draft: the recipe.
        wanted_by: the policies that compare.
    """
    names = given.names("eval_dataset")
    if not wanted_by:
        if names:
            reason = "no policy compares with it, and evaluated are held-out rows (val_size)"
            draft.note(given.place("eval_dataset"), reason, matters=False)
        return
    if names:
        root = draft.fields.get("data.root", "data")
        if draft.fields.get("data.source") == "local":
            given.refuse("eval_dataset", f"{wanted_by[0]} compares with examples; of stage pt there are documents only")
        draft.set(targets__source="dataset_info", targets__root=root, targets__domains=names)
        draft.set(targets__group_rows=draft.fields.get("data.max_samples"))
        draft.note(given.place("eval_dataset"), f"the target set of {', '.join(wanted_by)}, each dataset a group")
    elif not draft.fields.get("data.valid_fraction"):
        given.refuse("eval_dataset", f"{wanted_by[0]} compares with it; name one, or give val_size")


def _root(given: Given, draft: Draft) -> str:
    root = given.text("dataset_dir", "data")
    if root == "ONLINE" or root.startswith("REMOTE:"):
        given.refuse("dataset_dir", "a folder on this machine with dataset_info.json is expected")
    return draft.located(root)


def _conversations(given: Given, draft: Draft, root: str) -> None:
    draft.set(data__root=root, data__cutoff_len=given.integer("cutoff_len"))
    template = given.text("template")
    if template in _OF_TOKENIZER:
        draft.note(given.place("template"), "the tokenizer's own chat template, which config.data.template=None takes")
    elif template is not None:
        draft.set(data__template=given.one_of("template", _TEMPLATES | dict.fromkeys(_OF_TOKENIZER)))
    if not given.flag("enable_thinking", True):
        given.refuse("enable_thinking", "the chat template of the tokenizer says it, or config.data.template")
    packing, neat = given.flag("packing"), given.flag("neat_packing")
    if packing and not neat:
        draft.note(given.place("packing"), "examples in a row do not see each other, as with neat_packing")
    for name in ("train_on_prompt", "mask_history"):
        draft.set(**{f"data__{name}": given.flag(name) or None})
    draft.set(data__packing=packing or neat or None)


def _documents(given: Given, draft: Draft, root: str, names: Sequence[str]) -> tuple[str, ...]:
    """Documents of pretraining, which LLaMA-Factory has in dataset_info.json too: their files, a domain each."""
    if not given.flag("packing", True):
        given.refuse("packing", "rows of documents are always full")
    for name in ("template", "neat_packing", "train_on_prompt", "mask_history", "enable_thinking"):
        given.raw(name)
    draft.set(data__source="local", data__root=root, data__seq_len=given.integer("cutoff_len", 2048))
    info = Path(root)
    info = info / _INFO if not info.is_file() else info
    if not info.exists():
        reason = f"no {_INFO} in {root}: NAME.jsonl is looked for there, with its texts in the field 'text'"
        draft.note(given.place("dataset"), reason)
        draft.set(data__domains=tuple(names))
        return tuple(names)
    entries = read_object(info)
    found = [_document_file(given, f"{info}: {name!r}", entries.get(name)) for name in names]
    fields = sorted({field for _, field in found})
    if len(fields) > 1:
        given.refuse("dataset", f"their texts are in several fields ({', '.join(fields)}); give all the same name")
    domains = tuple(domain for domain, _ in found)
    draft.set(data__domains=domains, data__text_field=None if fields == ["text"] else fields[0])
    return domains


def _document_file(given: Given, place: str, entry: Any) -> tuple[str, str]:
    """(domain, field of the text) of an entry of dataset_info.json."""
    if not isinstance(entry, dict):
        given.refuse("dataset", f"{place}: no such entry")
    name, columns = entry.get("file_name"), entry.get("columns") or {}
    if not isinstance(name, str) or entry.get("hf_hub_url"):
        raise InputError(f"{place}: on the hub; config.data.source='hub' of a recipe reads one such dataset")
    if os.path.dirname(os.path.normpath(name)):
        raise InputError(f"{place}: file_name {name!r} is not in the folder itself; link it there")
    if not isinstance(columns, dict) or not isinstance(columns.get("prompt", "instruction"), str):
        raise InputError(f"{place}: columns must be an object with the field of the text as its 'prompt'")
    if name.endswith(".txt"):
        raise InputError(f"{place}: a .txt file is one document here, and a document a line there; write .jsonl")
    return name.split(".")[0], columns.get("prompt", "instruction")
