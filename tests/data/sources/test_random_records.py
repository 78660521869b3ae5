"""Five hundred random records of each format: a text or a problem in one line, never an exception."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from ml_collections import ConfigDict

from dataflex_jax.data.sources import dataset_info
from dataflex_jax.data.sources.formattings import formatting
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.sources.parts import FilePart, RecordsPart
from dataflex_jax.data.sources.streams import Stream, TextReader
from dataflex_jax.errors import InputError

RECORDS = 500
TEXTS = (
    "",
    "q",
    "a\nb",
    " ",
    "\ud800",
    "null",
    "{}",
    "[1]",
    '{"name": "f", "arguments": {}}',
    '{"set": "X"}',
    "[" * 300,
)
NUMBERS = (0, 1, -1, 0.5, 10**400, float("nan"), float("inf"), True, False, None)
ROLES = (
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "tool",
    "function",
    "function_call",
    "observation",
    "bot",
    3,
    None,
)
KEYS = (
    "from",
    "value",
    "role",
    "content",
    "weight",
    "loss_weight",
    "train",
    "loss",
    "tool_calls",
    "function_call",
    "name",
)
FIELDS = ("history", "system", "tools", "functions", "conversations", "messages")
REQUIRED = ("instruction", "input", "output", "prompt", "response")


def random_value(rng, depth=3):
    kind = rng.integers(0, 5 if depth else 2)
    if kind == 0:
        return TEXTS[rng.integers(len(TEXTS))]
    if kind == 1:
        return NUMBERS[rng.integers(len(NUMBERS))]
    if kind == 2:
        return [random_value(rng, depth - 1) for _ in range(rng.integers(0, 3))]
    names = ("function", "arguments", "id", "type", "text", "a") if kind == 3 else (*KEYS, "set")
    return {str(rng.choice(names)): random_value(rng, depth - 1) for _ in range(rng.integers(0, 4))}


def random_message(rng):
    """Half of the time what a message should look like, with faults."""
    if rng.random() < 0.03:
        return random_value(rng)
    message = {}
    for role, content, usual in (("from", "value", ROLES[:2]), ("role", "content", ROLES[2:4])):
        if rng.random() < 0.98:
            roles = usual if rng.random() < 0.8 else ROLES
            message[role] = roles[rng.integers(len(roles))]
            message[content] = "text" if rng.random() < 0.8 else random_value(rng)
    for key in KEYS[4:]:
        if rng.random() < 0.03:
            message[key] = random_value(rng)
    return message


def random_record(rng):
    record = {"text": "text" if rng.random() < 0.5 else random_value(rng), "meta": random_value(rng)}
    for field in (*REQUIRED, *FIELDS):
        if rng.random() < (0.9 if field in REQUIRED else 0.2):
            record[field] = "text" if field in REQUIRED and rng.random() < 0.8 else random_value(rng)
    for field in ("conversations", "messages"):
        if rng.random() < 0.8:
            record[field] = [random_message(rng) for _ in range(rng.integers(0, 5))]
    return {field: value for field, value in record.items() if rng.random() < 0.9}


def checked(name, part, at_least):
    """Reads a part, and counts the texts."""
    data = ConfigDict({"text_field": "text", "formatting": name})
    reader, texts = formatting(name).reader(data), 0
    for field in (None, "meta.set"):
        stream = Stream((part,), (), {None: "x"} if field is None else None, reader, field)
        documents = list(stream.documents(part))
        for document in documents:
            assert (document.text is None) == (document.problem is not None)
            assert document.problem is None or "\n" not in document.problem
            if document.text is not None and name is not None:
                assert Conversation.from_json(document.text).messages[-1]["role"] == "assistant"
        assert len(documents) == RECORDS
        texts += sum(document.text is not None for document in documents)
    assert texts >= at_least
    if name in ("sharegpt", "openai"):
        assert reader.is_marked((part,))


@pytest.mark.parametrize("name", [None, "alpaca", "sharegpt", "openai", "pairs"])
def test_random_records_of_memory_and_of_files(tmp_path, name):
    rng = np.random.default_rng(11)
    records = tuple(random_record(rng) for _ in range(RECORDS))
    at_least = 20 if name in ("sharegpt", "openai") else 100
    checked(name, RecordsPart("records", records), at_least)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    checked(name, FilePart(path), at_least)
    assert next(FilePart(path).records(("text",), 0)).index == 0


@pytest.mark.parametrize("name", ["sharegpt", "openai"])
def test_random_records_of_a_table(tmp_path, name):
    """Of a table the values of a column have one type, and what is absent is null."""
    rng = np.random.default_rng(12)
    path, rows = tmp_path / "a.parquet", []
    for _ in range(RECORDS):
        messages = [
            {
                "role": str(rng.choice(ROLES[:9])),
                "from": str(rng.choice(ROLES[:9])),
                "content": None if rng.random() < 0.1 else "text",
                "value": None if rng.random() < 0.1 else "text",
                "weight": [None, 0.0, 1.0, 0.5][rng.integers(4)],
                "tool_calls": [
                    {"function": {"name": "f", "arguments": {"a": 1} if rng.random() < 0.5 else {"b": b"x"}}}
                ]
                if rng.random() < 0.3
                else None,
            }
            for _ in range(rng.integers(0, 4))
        ]
        rows.append({"text": "x", "meta": {"set": "X"}, "conversations": messages, "messages": messages})
    pq.write_table(pa.Table.from_pylist(rows), path)
    checked(name, FilePart(path), 3)


def test_random_bytes_are_a_problem_or_one_line(tmp_path):
    rng = np.random.default_rng(13)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rng.bytes(int(rng.integers(1, 40))).replace(b"\n", b"{") for _ in range(RECORDS)))
    problems = [record.problem for record in FilePart(path).records(("text",), 0)]
    assert len(problems) > RECORDS // 2
    assert all(problem and "\n" not in problem for problem in problems)


def value_or_refusal(function, *arguments):
    """What a call returns, or the line with which it refuses."""
    try:
        return function(*arguments), None
    except InputError as error:
        return None, str(error)


def test_random_entries_of_dataset_info_are_streams_or_one_line(tmp_path):
    rng = np.random.default_rng(14)
    (tmp_path / "a.json").write_text('[{"instruction": "q", "output": "a"}]')
    keys = (
        "file_name",
        "formatting",
        "columns",
        "tags",
        "num_samples",
        "split",
        "ranking",
        "hf_hub_url",
        "folder",
        "x",
    )
    usual = {"file_name": "a.json", "formatting": "alpaca", "num_samples": 1, "split": "train", "ranking": False}
    opened, refused = 0, 0
    for _ in range(RECORDS):
        fields = {"file_name": "a.json"} if rng.random() < 0.7 else {}
        for key in keys:
            if rng.random() < 0.3:
                fields[key] = usual[key] if key in usual and rng.random() < 0.7 else random_value(rng)
        if isinstance(fields.get("hf_hub_url"), str):
            del fields["hf_hub_url"]  # would be looked for
        entry = dataset_info.Entry("here", tmp_path, fields if rng.random() < 0.95 else random_value(rng))
        found, refusal = value_or_refusal(dataset_info.open_entry, entry)
        if refusal is not None:
            refused += 1
            assert "\n" not in refusal
            continue
        opened += 1
        train, _, reader = found
        assert len(list(Stream(train, (), {None: "x"}, reader).documents(train[0]))) == 1
    assert min(opened, refused) > 50


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, suffix):
    rng = np.random.default_rng(15)
    rows = [{"text": f"text {i}", "meta": {"set": "X"}} for i in range(50)]
    path = tmp_path / f"a{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}.get(suffix, bytes)
        path.write_bytes(json.dumps(rows).encode() if suffix == ".json" else pack(lines))
    whole, stream = path.read_bytes(), Stream((FilePart(path),), (), {None: "x"}, TextReader("text"))
    for _ in range(60):
        damaged = bytearray(whole[: int(rng.integers(1, len(whole)))] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, len(damaged), int(rng.integers(1, 4))):
            damaged[at] = int(rng.integers(256))
        path.write_bytes(damaged)
        documents, refusal = value_or_refusal(lambda: list(stream.documents(stream.train[0])))
        if refusal is None:
            assert all((d.text is None) != (d.problem is None) for d in documents)
        else:
            assert refusal.startswith(str(path))
            assert "\n" not in refusal
