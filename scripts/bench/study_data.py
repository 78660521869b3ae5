"""The study's data as folders: what is trained on, what policies may look at, and what only the study measures.

train/NAME.jsonl, train/NAME.valid.jsonl and other/NAME.jsonl. The held-out documents of a domain are split in two, so
that no policy is measured on rows that it has looked at.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataflex_jax.errors import InputError
from dataflex_jax.files import replace_file
from dataflex_jax.foreign import read_json

TRAIN, OTHER = "train", "other"
_MEASURED, _LOOKED_AT = 3, 5  # of 20 parts of the questions: those below the first, and the next ones


def pretraining(source: Path, folder: Path) -> None:
    """Of NAME.jsonl and NAME.valid.jsonl: every second held-out document is what policies may look at.

    Raises:
        InputError: a domain without held-out documents.
    """
    names = sorted(path.stem for path in source.glob("*.jsonl") if not path.name.endswith(".valid.jsonl"))
    for name in names:
        valid = source / f"{name}.valid.jsonl"
        if not valid.exists():
            raise InputError(f"--data: {valid} is missing; the study measures on it")
        lines = valid.read_bytes().splitlines(keepends=True)
        replace_file(folder / TRAIN / f"{name}.jsonl", (source / f"{name}.jsonl").read_bytes())
        replace_file(folder / TRAIN / f"{name}.valid.jsonl", b"".join(lines[::2]))
        replace_file(folder / OTHER / f"{name}.jsonl", b"".join(lines[1::2]))


def instruction(source: Path, folder: Path) -> None:
    """Of NAME_*.json, Alpaca's or ShareGPT's: questions with their answers, a domain a file.

    Every turn of a conversation is an example of its own. Those of one conversation tree, or with one first question,
    are on one side: train (15 of 20 parts), held out, which is measured (3), or what policies look at (2).
    """
    for path in sorted(source.glob("*.json")):
        name = path.stem.partition("_")[0]
        sides: tuple[list[bytes], ...] = ([], [], [])
        seen = set()
        for tree, question, answer in _examples(read_json(path)):
            if (question, answer) in seen or not question or not answer:
                continue
            seen.add((question, answer))
            part = int(hashlib.blake2b(f"{name}/{tree}".encode(), digest_size=4).hexdigest(), 16) % 20
            side = 0 if part >= _LOOKED_AT else 1 if part < _MEASURED else 2
            # A short system prompt, in place of the template's long one, of which short rows would be full.
            line = json.dumps({"system": "Answer.", "instruction": question, "output": answer})
            sides[side].append(f"{line}\n".encode())
        files = (TRAIN, f"{name}.jsonl"), (TRAIN, f"{name}.valid.jsonl"), (OTHER, f"{name}.jsonl")
        for (where, file), lines in zip(files, sides, strict=True):
            replace_file(folder / where / file, b"".join(lines))


def _examples(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(what tells its tree, question, answer) of every question that is answered right away."""
    for record in records:
        if "conversations" not in record:
            question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
            yield question, question, record["output"]
            continue
        turns = record["conversations"]
        tree = record.get("tree_id") or turns[0]["value"]
        for asked, answered in itertools.pairwise(turns):
            if asked["from"] == "human" and answered["from"] in ("gpt", "function_call"):
                yield tree, asked["value"], answered["value"]
