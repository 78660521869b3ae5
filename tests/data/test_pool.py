"""The pool: what its rows are called, and what was said in them."""

import json

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.listed import ListedRows
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import Row
from tests.helpers import tiny_chat


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def domains(root):
    return open_domains(tiny_chat.config(root, data__valid_fraction=0.3).data, progress=False)[0]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_example_is_called_by_its_record_and_has_its_conversation(root, domains, split):
    pool = Pool(domains, split)
    chosen = np.array([0, pool.num_rows // 3, pool.num_rows - 1, 3])
    conversations = pool.conversations(chosen)
    assert sorted(conversations) == sorted(chosen.tolist())
    for i in chosen.tolist():
        name, record = domains[int(pool.domain_of(i))].name, int(pool.records()[i])
        line = json.loads((root / f"{name}.jsonl").read_text().splitlines()[record])
        assert pool.where(i) == f"record {record} of {name!r}"
        said = [message["content"] for message in conversations[i].messages]
        assert said == [line["instruction"], line["output"]]


def test_rows_without_records_are_numbered():
    pool = ListedRows([Row(np.arange(3, dtype=np.int32), np.ones(2, bool))] * 2).pool("texts")
    assert pool.where(1) == "row 1 of 'texts'"
    assert pool.conversations(np.array([1])) is None
