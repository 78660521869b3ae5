"""MMLU's questions as instruction data: a folder of SUBJECT_dev.csv, SUBJECT_val.csv or SUBJECT_test.csv files.

Rows have no header: question, four choices, the letter of the right one. Each becomes the conversation in which the
benchmark's authors ask it without examples, and whose response is the letter (Hendrycks et al. 2021, arXiv:2009.03300).
"""

import csv
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex_jax.data.sources.files import Record, faults_named
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.sources.parts import FilePart

FORMATTING = "mmlu"
FORMATS = (".csv",)
LETTERS = "ABCD"
_FIELDS = ("question", *LETTERS, "answer")
_SPLIT = re.compile(r"_(dev|val|test)$")


def subject_of(stem: str) -> str:
    """`"high_school_physics_dev"` -> `"high_school_physics"`; other names stay as they are."""
    return _SPLIT.sub("", stem)


@dataclasses.dataclass(frozen=True)
class MmluPart(FilePart):
    """One file of questions about one subject, which its name says; its records have the fields of the hub's MMLU."""

    @property
    def subject(self) -> str:
        """What the questions are about, in words."""
        return subject_of(self.path.stem.removesuffix(".valid")).replace("_", " ")

    def fingerprint(self, hash_file: Callable[[Path], str]) -> str:
        """Changes when the records do."""
        return f"{FORMATTING}:{self.subject}:{hash_file(self.path)}"

    def records(self, columns: Sequence[str], start: int, optional: Sequence[str] = ()) -> Iterator[Record]:
        """Records from number `start` on, with all their fields."""
        del columns, optional
        with faults_named(self.path), open(self.path, encoding="utf-8-sig", newline="") as file:
            for index, row in enumerate(csv.reader(file)):
                if row and index >= start:
                    yield self._record(index, file.buffer.tell(), row)

    def place(self, index: int) -> str:
        """Where record `index` lies, for messages: the line on which it begins."""
        with faults_named(self.path), open(self.path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            for _ in itertools.islice(rows, index):
                pass
            return f"{self.path}:{rows.line_num + 1}"

    def _record(self, index: int, position: int, row: list[str]) -> Record:
        if len(row) != len(_FIELDS):
            problem = f"{len(row)} columns; must be {len(_FIELDS)}: {', '.join(_FIELDS)}"
            return Record(index, position, None, problem)
        question, *choices, answer = row
        fields = {"question": question, "subject": self.subject, "choices": choices, "answer": answer}
        return Record(index, position, fields, None)


def mmlu_parts(paths: Sequence[Path]) -> tuple[MmluPart, ...]:
    """A part for each file."""
    return tuple(map(MmluPart, paths))


@dataclasses.dataclass(frozen=True)
class MmluReader:
    """Makes conversations of questions; a `dataflex_jax.data.sources.streams.Reader`, as `ConversationReader` is."""

    columns = ("question", "subject", "choices", "answer")
    optional_columns = ()

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes when the conversations do."""
        return {"formatting": FORMATTING, "version": 1}

    def text(self, fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """(canonical JSON, None), or (None, what is wrong with the record)."""
        question, subject, choices, answer = (fields.get(column) for column in self.columns)
        if isinstance(answer, int) and answer in range(len(LETTERS)):  # so the hub's tables have it
            answer = LETTERS[answer]
        if not isinstance(answer, str) or answer not in tuple(LETTERS):
            return None, f"answer {answer!r}: must be one of {', '.join(LETTERS)}"
        texts = [question, subject, *choices] if isinstance(choices, Sequence) else []
        if len(texts) != 2 + len(LETTERS) or not all(isinstance(text, str) for text in texts):
            return None, f"needs texts as question and subject and {len(LETTERS)} as choices"
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        prompt = "\n".join([about, "", question, *lines, "Answer:"])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Conversation(messages).to_json(), None
