"""Folders of MMLU's csv files: a domain a subject, the benchmark's prompt, one line for each fault."""

import csv

import datasets
import pytest

from dataflex_jax import config as configuration
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.sources.mmlu import MmluReader
from dataflex_jax.data.sources.table import open_source
from dataflex_jax.data.stores.examples import open_example_stores
from dataflex_jax.errors import InputError
from tests.helpers import tiny

PHYSICS = [
    ("How fast is light?", "Slow", "Fast", "Very fast, in vacuum", '"c"', "D"),
    ("A statement:\nis it true,\nor false?", "True", "False", "Both", "Neither", "B"),
    ("What falls?", "1", "2", "3", "4", "A"),
]
PROMPT = """The following are multiple choice questions (with answers) about high school physics.

How fast is light?
A. Slow
B. Fast
C. Very fast, in vacuum
D. "c"
Answer:"""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "mmlu" / "high_school_physics_dev.csv", PHYSICS)
    write(tmp_path / "mmlu" / "anatomy_dev.csv", PHYSICS[:1])
    return tmp_path / "mmlu"


def config(root, **fields):
    return tiny.config(root, data__formatting="mmlu", **fields).data


def conversations(stream):
    documents = [document for part in stream.train for document in stream.documents(part)]
    assert all(document.problem is None for document in documents)
    return [Conversation.from_json(document.text).messages for document in documents]


def test_a_domain_a_subject_with_the_benchmarks_prompt(root):
    anatomy, physics = open_source(config(root))
    assert [stream.domains for stream in (anatomy, physics)] == [{None: "anatomy"}, {None: "high_school_physics"}]
    first, second, _ = conversations(physics)
    assert first == [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "D"}]
    assert "\n\nA statement:\nis it true,\nor false?\nA. True\n" in second[0]["content"]
    assert "(with answers) about anatomy.\n" in conversations(anatomy)[0][0]["content"]


@pytest.mark.parametrize("ending", ["_val", "_test", ""])
def test_every_split_of_the_benchmark_has_the_same_domains(tmp_path, ending):
    write(tmp_path / f"abstract_algebra{ending}.csv", PHYSICS)
    (stream,) = open_source(config(tmp_path))
    assert stream.domains == {None: "abstract_algebra"}
    assert "about abstract algebra.\n" in conversations(stream)[0][0]["content"]


def test_two_splits_in_one_folder_are_refused(root):
    write(root / "anatomy_val.csv", PHYSICS)
    with pytest.raises(InputError, match=r"'anatomy' has several inputs \(anatomy_dev.csv, anatomy_val.csv\)"):
        open_source(config(root))


def test_the_store_has_the_rows_and_their_fields(root):
    _, physics = open_example_stores(config(root, data__valid_fraction=0.0, data__cutoff_len=600), progress=False)[0]
    assert physics.train.ids.tolist() == [0, 1, 2]
    assert physics.values("train", "answer") == ["D", "B", "A"]
    assert physics.values("train", "subject") == ["high school physics"] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PHYSICS[0][:5], "5 columns; must be 6: question, A, B, C, D, answer"),
        ((*PHYSICS[0], "A"), "7 columns; must be 6"),
        ((*PHYSICS[0][:5], "E"), "answer 'E': must be one of A, B, C, D"),
        ((*PHYSICS[0][:5], "AB"), "answer 'AB': must be"),
        ((*PHYSICS[0][:5], ""), "answer '': must be"),
    ],
)
def test_a_bad_row_is_named_by_its_line_or_skipped(root, row, message):
    path = root / "high_school_physics_dev.csv"
    write(path, [PHYSICS[1], row, PHYSICS[2]])
    # The row before takes lines 1 to 3.
    with pytest.raises(InputError, match=rf"^{path}:4: {message}") as caught:
        open_example_stores(config(root), progress=False)
    assert "\n" not in str(caught.value)
    options = {"data__on_bad_record": "skip", "data__valid_fraction": 0.0, "data__cutoff_len": 600}
    _, physics = open_example_stores(config(root, **options), progress=False)[0]
    assert (physics.skipped_records, physics.train.ids.tolist()) == (1, [0, 2])


def test_a_file_that_is_no_text_is_named(root):
    path = root / "anatomy_dev.csv"
    path.write_bytes(b"\xff\xfe1,2,3,4,5,6\n")
    with pytest.raises(InputError, match=rf"^{path}: cannot be read"):
        open_example_stores(config(root), progress=False)


def test_the_same_rows_about_another_subject_are_other_data(root):
    streams = open_source(config(root))
    write(root / "anatomy_dev.csv", PHYSICS)
    anatomy, physics = (stream.train[0].fingerprint(lambda path: str(path.read_bytes())) for stream in streams)
    assert anatomy != physics


def test_the_hubs_table_has_the_same_questions(tmp_path):
    rows = [
        {"question": q, "subject": "high_school_physics", "choices": choices, "answer": "ABCD".index(answer)}
        for q, *choices, answer in PHYSICS
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "table"))
    (stream,) = open_source(config(tmp_path / "table", data__source="hub"))
    assert conversations(stream)[0] == [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "D"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": 4}, "answer 4: must be one of A, B, C, D"),
        ({"answer": 1.0}, "answer 1.0: must be one of"),
        ({"choices": ["1", "2"]}, "needs texts as question and subject and 4 as choices"),
        ({"question": None}, "needs texts as question"),
    ],
)
def test_a_bad_record_of_a_table(fields, message):
    record = {"question": "q", "subject": "s", "choices": ["1", "2", "3", "4"], "answer": "A", **fields}
    text, problem = MmluReader().text(record)
    assert text is None
    assert problem.startswith(message)


def test_the_formatting_is_accepted_where_there_is_such_data(root):
    configuration.validate(tiny.config(root, data__formatting="mmlu"))
    with pytest.raises(InputError, match=r"must be one of 'alpaca', .*, 'mmlu', or None"):
        configuration.validate(tiny.config(root, data__formatting="squad"))
    with pytest.raises(InputError, match=r"with source 'builtin' accepted are None and 'alpaca'"):
        open_source(config(root, data__source="builtin"))
