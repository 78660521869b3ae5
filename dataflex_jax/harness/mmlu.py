"""MMLU's tasks over a folder with the benchmark's original files, in place of the hub's data set.

The folder has dev/SUBJECT_dev.csv for the examples, and test/SUBJECT_test.csv or val/SUBJECT_val.csv for the questions.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_jax.data.sources.mmlu import LETTERS, MmluPart
from dataflex_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

# The data sets on the hub that these files are.
HUB_NAMES = ("cais/mmlu", "hails/mmlu_no_train")


def fault_of(folder: Path) -> str | None:
    """Why a folder is not one with the benchmark's files; None: it is."""
    if not folder.is_dir():
        return "no such folder"
    if not any(folder.glob("dev/*_dev.csv")) or _split(folder) is None:
        return "must hold dev/SUBJECT_dev.csv, and test/SUBJECT_test.csv or val/SUBJECT_val.csv"
    return None


@dataclasses.dataclass(frozen=True)
class LocalQuestions:
    """A subject's questions in a folder, as a harness's `custom_dataset`."""

    folder: str
    subject: str

    def __call__(self, **about_the_task: Any) -> "datasets.DatasetDict":
        """The questions as the hub's data set has them; its splits "validation" and "test" are the same here.

        Raises:
            InputError: a file that is missing, or is no table of questions.
        """
        del about_the_task
        import datasets  # takes a second

        folder, split = Path(self.folder), _split(Path(self.folder))
        questions = datasets.Dataset.from_list(_records(folder / split / f"{self.subject}_{split}.csv"))
        examples = datasets.Dataset.from_list(_records(folder / "dev" / f"{self.subject}_dev.csv"))
        return datasets.DatasetDict(dev=examples, validation=questions, test=questions)


def _split(folder: Path) -> str | None:
    """Where the questions are."""
    return next((split for split in ("test", "val") if any(folder.glob(f"{split}/*_{split}.csv"))), None)


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is where this subject's questions must be")
    part = MmluPart(path)
    records = []
    for record in part.records((), 0):
        problem = record.problem or _problem(record.fields)
        if problem is not None:
            raise InputError(f"{part.place(record.index)}: {problem}")
        records.append(record.fields | {"answer": LETTERS.index(record.fields["answer"])})
    if not records:
        raise InputError(f"{path}: has no question")
    return records


def _problem(fields: dict[str, Any]) -> str | None:
    answer = fields["answer"]
    return None if answer in tuple(LETTERS) else f"answer {answer!r}: must be one of {', '.join(LETTERS)}"
