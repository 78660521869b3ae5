"""Chosen records as a file."""

import json
import os

import pyarrow.parquet
import pytest

from dataflex_jax.data.sources.instruct import ConversationReader
from dataflex_jax.selection.records import as_messages, write_records


def test_records_of_several_kinds_keep_all_their_fields(tmp_path):
    records = [{"instruction": "a"}, {"output": "b", "instruction": "c"}]
    for name in ("x.jsonl", "x.parquet"):
        write_records(tmp_path / name, iter(records))
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == records
    read = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert read == [{"instruction": "a", "output": None}, {"instruction": "c", "output": "b"}]


def test_a_conversation_with_function_calls_is_the_same_when_it_is_read_again():
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": [2]}}'}
    said = [{"from": "human", "value": "1 + 2?"}, call, {"from": "observation", "value": "3"}]
    tools = '[{"name": "add", "parameters": {"a": {"type": "number"}}}]'
    record = {"conversations": [*said, {"from": "gpt", "value": "3"}], "system": "Count.", "tools": tools}
    conversation = ConversationReader.usual("sharegpt").conversation(record)
    written = as_messages(conversation)
    assert isinstance(written["tools"], str)  # a table's columns have one type
    assert ConversationReader.usual("openai").conversation(written) == conversation


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_records_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch, name):
    path = tmp_path / "new" / name
    write_records(path, iter([{"instruction": "a"}]))
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_records(path, iter([{"instruction": "b"}] * 9))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [name]
