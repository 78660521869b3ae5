"""MMLU's own files in the place of the hub's data set."""

import csv

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.harness.mmlu import LocalQuestions, fault_of

ROWS = [("Which?", "one", "two, or so", "three", "4", "B"), ("And\nthen?", "a", "b", "c", "d", "D")]


def write(root, split, rows, subject="law"):
    (root / split).mkdir(parents=True, exist_ok=True)
    with open(root / split / f"{subject}_{split}.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_questions_and_examples_have_the_fields_of_the_hub(tmp_path):
    write(tmp_path, "dev", ROWS[:1])
    write(tmp_path, "val", ROWS)
    assert fault_of(tmp_path) is None
    made = LocalQuestions(str(tmp_path), "law")(version=1.0)
    assert made["dev"][0] == {"question": "Which?", "subject": "law", "choices": list(ROWS[0][1:5]), "answer": 1}
    assert [row["answer"] for row in made["test"]] == [1, 3]
    assert made["validation"].to_list() == made["test"].to_list()


def test_the_questions_of_test_come_before_those_of_val(tmp_path):
    write(tmp_path, "dev", ROWS)
    write(tmp_path, "val", ROWS)
    write(tmp_path, "test", ROWS[1:])
    assert len(LocalQuestions(str(tmp_path), "law")()["test"]) == 1


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([ROWS[0], ("q", "a", "b", "A")], r"law_val.csv:2: 4 columns; must be 6"),
        ([(*ROWS[0][:5], "E")], r"law_val.csv:1: answer 'E': must be one of A, B, C, D"),
        ([], "law_val.csv: has no question"),
        (None, "law_val.csv: no such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, rows, fault):
    write(tmp_path, "dev", ROWS)
    write(tmp_path, "val", ROWS, "other")
    if rows is not None:
        write(tmp_path, "val", rows)
    with pytest.raises(InputError, match=fault):
        LocalQuestions(str(tmp_path), "law")()


def test_a_folder_without_the_layout_is_refused(tmp_path):
    assert fault_of(tmp_path / "none") == "no such folder"
    write(tmp_path, "dev", ROWS)
    assert "test/SUBJECT_test.csv or val/SUBJECT_val.csv" in fault_of(tmp_path)
