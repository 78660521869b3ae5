"""Every format gives the canonical conversation; what cannot be one is said in one line that names file and record."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from dataflex_jax.data.sources import builtin_chat, dataset_info
from dataflex_jax.data.sources.instruct import Conversation, ConversationReader
from dataflex_jax.data.sources.table import open_source
from dataflex_jax.errors import InputError


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


CALL = {"id": "000000000", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}


def messages(formatting, **record):
    return ConversationReader.usual(formatting).conversation(record).messages


def test_alpaca():
    assert messages("alpaca", instruction="Add", input="1 2", output="3") == [user("Add\n1 2"), assistant("3")]
    assert messages("alpaca", instruction="Add", input="", output="3") == [user("Add"), assistant("3")]
    assert messages("alpaca", instruction="Hi", output="") == [user("Hi"), assistant("")]
    record = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert messages("alpaca", **record) == [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]


def test_pairs():
    assert messages("pairs", prompt="q", response="a", other=1) == [user("q"), assistant("a")]


def test_sharegpt_with_function_calls():
    turns = [("system", "s"), ("human", "1+1?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}')]
    turns += [("observation", "2"), ("gpt", "two")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps([TOOL])}
    conversation = ConversationReader.usual("sharegpt").conversation(record)
    result = {"role": "tool", "content": "2", "tool_call_id": "000000000"}
    called = assistant("", tool_calls=[CALL])
    assert conversation.messages == [system("s"), user("1+1?"), called, result, assistant("two")]
    assert conversation.tools == [{"type": "function", "function": TOOL}]
    assert Conversation.from_json(conversation.to_json()) == conversation


def test_openai_messages():
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
            {"role": "assistant", "content": "two", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    conversation = ConversationReader.usual("openai").conversation(record)
    result = {"role": "tool", "content": "2", "tool_call_id": "x"}
    called = assistant("", tool_calls=[{**CALL, "id": "x"}])
    assert conversation.messages == [user("1+1?"), called, result, assistant("two")]
    assert conversation.tools == record["tools"]


def test_a_system_message_overrides_the_system_field():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert messages("sharegpt", conversations=turns, system="field")[0] == system("field")
    turns.insert(0, {"from": "system", "value": "own"})
    assert messages("sharegpt", conversations=turns, system="field")[0] == system("own")


SHAREGPT, OPENAI = ConversationReader.usual("sharegpt"), ConversationReader.usual("openai")
ALPACA = ConversationReader.usual("alpaca")


def listed(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("reader", "record", "message"),
    [
        (SHAREGPT, listed(("bot", "a")), "message 0 of 'conversations': unknown role 'bot'; accepted: human, gpt, "),
        (SHAREGPT, {"conversations": []}, "the conversation is empty"),
        (SHAREGPT, listed(("system", "s")), "the conversation is empty"),
        (SHAREGPT, listed(("human", "q")), "the last turn is the user's; it must be the assistant's"),
        (SHAREGPT, {"messages": []}, "no field 'conversations' (column 'messages'); the record has messages"),
        (SHAREGPT, {"conversations": "hi"}, "field 'conversations' must be a list but is str"),
        (SHAREGPT, {"conversations": [{"role": "user"}]}, "message 0 of 'conversations': no 'from'; it has role"),
        (SHAREGPT, {"conversations": ["hi"]}, "message 0 of 'conversations': no 'from'; it is str"),
        (SHAREGPT, listed(("human", 3)), "message 0 of 'conversations': 'value' must be text but is int"),
        (SHAREGPT, listed(("human", "q"), ("function_call", "add(1)")), "message 1 of 'conversations': not valid JSON"),
        (SHAREGPT, listed(("function_call", "[3]")), "a function call must look like {'name': ..., 'arguments': ...}"),
        (SHAREGPT, {**listed(("human", "q"), ("gpt", "a")), "tools": "{"}, "tools: not valid JSON"),
        (SHAREGPT, {**listed(("human", "q"), ("gpt", "a")), "tools": "3"}, "tools must be a list"),
        (OPENAI, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text but is list"),
        (OPENAI, {"messages": [{"role": "assistant", "content": None}]}, "must be text but is null"),
        (ALPACA, {"instruction": "q"}, "no field 'output' (column 'response'); the record has instruction"),
        (ALPACA, {"instruction": "q", "output": None}, "field 'output' must be a string but is null"),
        (ALPACA, {"instruction": "", "input": "", "output": "a"}, "the conversation is empty: field 'instruction'"),
        (ALPACA, {"instruction": "q", "input": 3, "output": "a"}, "field 'input' must be a string but is int"),
        (ALPACA, {"instruction": "q", "output": "a", "history": [["b"]]}, "field 'history': entry 0 is not a [prompt"),
    ],
)
def test_bad_records(reader, record, message):
    text, problem = reader.text(record)
    assert text is None
    assert message in problem
    assert "\n" not in problem


def config(root, **fields):
    known = {"source": "dataset_info", "root": str(root), "formatting": None, "domains": None, "domain_field": None}
    return ConfigDict(
        {**known, "domain_values": None, "text_field": "text", "max_samples": None, "weight_key": None, **fields}
    )


def write_info(folder, entries, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    for name, records in files.items():
        path = folder / name.replace("__", ".")
        if path.name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        elif path.name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text(json.dumps(records, indent=1))
    return folder


def conversations(stream):
    found = [document for part in stream.train for document in stream.documents(part)]
    return [document.problem or Conversation.from_json(document.text).messages for document in found]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_dataset_info_describes_files_folders_columns_and_tags(tmp_path):
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entries = {
        "plain": {"file_name": "plain.json"},
        "renamed": {"file_name": "renamed.jsonl", "columns": {"prompt": "q", "response": "a", "system": "s"}},
        "chat": {"file_name": "chat.parquet", "formatting": "sharegpt", "columns": {"messages": "m"}, "tags": tags},
        "folder": {"file_name": "many", "formatting": "openai"},
        "hub": {"hf_hub_url": "somebody/something", "file_name": "plain.json"},
    }
    write_info(
        tmp_path,
        entries,
        plain__json=[{"instruction": "q", "input": "i", "output": "a"}],
        renamed__jsonl=[{"q": "q", "a": "a", "s": "s", "input": "not read"}, {"q": "q2", "a": "a2"}],
        chat__parquet=[{"m": TURNS, "system": "not read"}],
    )
    write_info(tmp_path / "many", {}, one__json=[{"messages": TURNS}], two__jsonl=[{"messages": TURNS}] * 2)
    (tmp_path / "many" / "dataset_info.json").unlink()
    streams = {stream.domains[None]: stream for stream in open_source(config(tmp_path))}
    assert list(streams) == ["chat", "folder", "plain", "renamed"]  # the hub's only where it is named
    assert conversations(streams["plain"]) == [[user("q\ni"), assistant("a")]]
    assert conversations(streams["renamed"]) == [
        [system("s"), user("q"), assistant("a")],
        [user("q2"), assistant("a2")],
    ]
    assert conversations(streams["chat"]) == [TURNS]
    assert conversations(streams["folder"]) == [TURNS] * 3
    (chosen,) = open_source(config(tmp_path, domains=("plain",)))
    assert chosen.domains == {None: "plain"}


def test_dataset_info_with_a_hub_dataset(tmp_path):
    """A save_to_disk folder stands for the hub; its validation split is held out."""
    splits = {
        name: datasets.Dataset.from_list([{"messages": TURNS}] * rows)
        for name, rows in (("train_sft", 3), ("validation", 2))
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    entry = {"hf_hub_url": str(tmp_path / "saved"), "split": "train_sft", "formatting": "openai"}
    write_info(tmp_path, {"hub": entry, "wrong": {**entry, "split": "test"}})
    (stream,) = open_source(config(tmp_path, domains=("hub",)))
    assert conversations(stream) == [TURNS] * 3
    assert sum(len(list(stream.documents(part))) for part in stream.valid) == 2
    with pytest.raises(InputError, match=r"'wrong': split='test': .* has train_sft, validation"):
        open_source(config(tmp_path, domains=("wrong",)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "no.json"}, "'x': file_name 'no.json': no such file"),
        ({"file_name": "a.csv"}, r"'a.csv': unknown format; accepted are .jsonl\[.gz"),
        ({"ms_hub_url": "a/b"}, "'x': needs file_name or hf_hub_url; it has ms_hub_url"),
        ({"file_name": "a.json", "formatting": "chatml"}, "formatting 'chatml' is not supported; accepted: alpaca, "),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "column 'images' is not supported: examples are texts"),
        (
            {"file_name": "a.json", "columns": {"prompt": "text"}},
            "column 'response' is missing: a prompt alone is text for pretraining, which .* data.text_field='text'",
        ),
        ({"file_name": "a.json", "columns": ["prompt"]}, "columns must be an object but is list"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": {"bot_tag": "x"}}, "tag 'bot_tag': 'x' is not supp"),
        ({"file_name": "a.json", "ranking": True}, "'ranking' is not supported"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples is 0; must be at least 1"),
        ({"file_name": "a.json", "num_samples": "9"}, "num_samples must be an integer but is str"),
        ({"file_name": "a.json", "num_samples": True}, "num_samples must be an integer but is bool"),
        ({"file_name": 5}, "file_name must be a string but is int"),
        ({"hf_hub_url": 5}, "hf_hub_url must be a string but is int"),
        ({"file_name": "../a.json"}, "file_name '../a.json' leaves the folder of dataset_info.json"),
        ({"file_name": "/etc/a.json"}, "file_name '/etc/a.json' leaves the folder of dataset_info.json"),
        ("see our wiki", "'x': must be an object, such as .* but is str"),
        ({"file_name": "a.json", "split": "test"}, "split 'test': a file has only the split 'train'"),
    ],
)
def test_dataset_info_entries_that_are_refused(tmp_path, entry, message):
    write_info(tmp_path, {"x": entry}, a__json=[], a__csv=[])
    with pytest.raises(InputError, match=message) as caught:
        open_source(config(tmp_path, domains=("x",)))
    assert "\n" not in str(caught.value)


PLAIN = [{"instruction": f"q{i}", "input": None, "output": f"a{i}"} for i in range(20)]
PEOPLES = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "instruction", "response": "output", "topic": "t"}},
    "few": {"file_name": "mine.json", "num_samples": 5},
    "pt": {"file_name": "mine.json", "columns": {"prompt": "instruction"}},
    "pairs": {"file_name": "mine.json", "ranking": True},
    "pictures": {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "chinese": {"ms_hub_url": "a/b"},
    "hub": {"hf_hub_url": "a/b"},
    "gone": {"file_name": "gone.json"},
    "_comment": "ours",
}


def test_what_is_not_read_of_a_datasets_folder_is_named(tmp_path):
    write_info(tmp_path, {"x": {"file_name": "x"}, "empty": {"file_name": "empty"}})
    write_info(tmp_path / "x" / "deep", {}, a__json=PLAIN, b__valid__jsonl=PLAIN[:3])
    (tmp_path / "empty").mkdir()
    (stream,) = open_source(config(tmp_path, domains=("x",)))
    assert (len(conversations(stream)), len(list(stream.documents(stream.valid[0])))) == (20, 3)
    (tmp_path / "x" / "more.csv").touch()
    with pytest.raises(InputError, match=r"'x': file_name 'x': not read, of no known format: more.csv; accepted are"):
        open_source(config(tmp_path, domains=("x",)))
    with pytest.raises(InputError, match=r"'empty': file_name 'empty': nothing to train on; accepted are"):
        open_source(config(tmp_path, domains=("empty",)))


def test_what_is_not_usable_of_peoples_dataset_info_is_listed_and_passed_over(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(dataset_info.logger, "warning", lambda message, *values: warnings.append(message % values))
    write_info(tmp_path, {}, mine__json=PLAIN)
    (tmp_path / "dataset_info.json").write_text("\ufeff" + json.dumps(PEOPLES, indent=2))
    assert [stream.domains[None] for stream in open_source(config(tmp_path))] == ["few", "mine"]
    ignored, listed = warnings
    assert ignored.endswith("'mine': columns that are not known are ignored: topic")
    assert "hub (on the hub, read where data.domains names it)" in listed
    for name in PEOPLES.keys() - {"mine", "few", "hub"}:
        assert f"{name} (" in listed
        with pytest.raises(InputError, match=f"'{name}': "):
            open_source(config(tmp_path, domains=("mine", name)))
    (tmp_path / "dataset_info.json").write_text('{\n// ours\n"mine": {"file_name": "mine.json"}}')
    with pytest.raises(InputError, match=r"dataset_info.json: not valid JSON \(.*line 2 column"):
        open_source(config(tmp_path))


@pytest.mark.parametrize("split", ["files", "table", "hub"])
def test_num_samples_takes_that_many_records_and_always_the_same(tmp_path, split):
    write_info(tmp_path, {}, a__parquet=PLAIN)
    write_info(tmp_path / "files", {}, a__jsonl=PLAIN[:12], b__jsonl=PLAIN[12:])
    (tmp_path / "files" / "dataset_info.json").unlink()
    datasets.Dataset.from_list(PLAIN).save_to_disk(str(tmp_path / "hub"))
    entry = {
        "files": {"file_name": "files"},
        "table": {"file_name": "a.parquet"},
        "hub": {"hf_hub_url": str(tmp_path / "hub")},
    }[split]
    sizes = {"whole": None, "six": 6, "same": 6, "all": 99}
    write_info(tmp_path, {name: {**entry, "num_samples": size} for name, size in sizes.items()})
    streams = open_source(config(tmp_path, domains=tuple(sizes)))
    whole, six, same, everything = map(conversations, streams)
    assert (len(six), six, everything) == (6, same, whole)
    assert all(one in whole for one in six)
    assert six != whole[:6]
    prints = [[part.fingerprint(lambda path: path.name) for part in stream.train] for stream in streams]
    assert prints[1] == prints[2] != prints[3] != prints[0]


def test_max_samples_takes_the_first_records_of_each_domain(tmp_path):
    write_info(tmp_path / "files", {}, a__jsonl=PLAIN[:12], b__jsonl=PLAIN[12:])
    (tmp_path / "files" / "dataset_info.json").unlink()
    write_info(tmp_path, {"many": {"file_name": "files"}, "few": {"file_name": "few.json"}}, few__json=PLAIN[:3])

    def opened(number):
        few, many = open_source(config(tmp_path, domains=("few", "many"), max_samples=number))
        return conversations(few), conversations(many), [p.fingerprint(lambda path: path.name) for p in many.train]

    few, many, whole = opened(None)
    assert opened(14)[:2] == (few, many[:14])
    assert opened(2)[:2] == (few[:2], many[:2])
    assert len({tuple(opened(number)[2]) for number in (2, 14)} | {tuple(whole)}) == 3


def test_max_samples_is_refused_where_files_hold_several_domains(tmp_path):
    data = config(tmp_path, source="local", domain_field="kind", max_samples=3)
    with pytest.raises(InputError, match=r"^config\.data\.max_samples = 3: not with config\.data\.domain_field"):
        open_source(data)


def test_a_link_to_nothing_in_a_datasets_folder_is_refused(tmp_path):
    write_info(tmp_path, {"x": {"file_name": "x"}})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(InputError, match=r"x/a.json: a link to .*/gone.json, which does not exist"):
        open_source(config(tmp_path))


def test_dataset_info_that_is_not_there_or_lacks_the_name(tmp_path):
    with pytest.raises(InputError, match=r"config.data.root = .* needs a folder with dataset_info.json"):
        dataset_info.read(str(tmp_path))
    write_info(tmp_path, {"b": {}, "a": {}})
    with pytest.raises(InputError, match=r"'c' is not in .*dataset_info.json; available: a, b"):
        open_source(config(tmp_path, domains=("c",)))
    write_info(tmp_path, {"a": {"hf_hub_url": "somebody/something"}})
    with pytest.raises(InputError, match=r"is usable here without being named in data.domains: a \(on the hub"):
        open_source(config(tmp_path))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset_info.json: not valid JSON"):
        dataset_info.read(str(tmp_path))
    (tmp_path / "dataset_info.json").write_text("[]")
    with pytest.raises(InputError, match=r"dataset_info.json: a JSON list; one object is expected"):
        dataset_info.read(str(tmp_path))


def test_local_files_and_the_places_of_their_problems(tmp_path):
    good, bad = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, listed(("x", "y"))
    write_info(tmp_path, {}, a__json=[good, bad], b__jsonl=[good, bad], c__parquet=[good, bad])
    streams = open_source(config(tmp_path, source="local", formatting="sharegpt"))
    assert [stream.domains[None] for stream in streams] == ["a", "b", "c"]  # dataset_info.json is no data
    for stream, place in zip(streams, ("a.json: record 1", "b.jsonl:2", "c.parquet: row 1"), strict=True):
        first, second = conversations(stream)
        assert first == [user("q"), assistant("a")]
        assert second.startswith(f"{tmp_path}/{place}: message 0 of 'conversations': unknown role 'x'")


def test_a_table_names_the_columns_that_it_has(tmp_path):
    write_info(tmp_path, {"t": {"file_name": "t.parquet"}}, t__parquet=[{"question": "q", "answer": "a"}])
    (stream,) = open_source(config(tmp_path))
    with pytest.raises(InputError, match=r"t.parquet: no column 'instruction'; it has question, answer"):
        conversations(stream)


def test_formatting_belongs_to_the_entries_of_dataset_info(tmp_path):
    with pytest.raises(
        InputError,
        match=r"^config.data.formatting: not with source 'dataset_info': each entry .* has its own; set it to None",
    ):
        open_source(config(tmp_path, formatting="alpaca"))


def test_builtin_examples():
    for name in builtin_chat.DOMAINS:
        records = builtin_chat.records(name)
        assert len(records) > 30
        assert records == builtin_chat.records(name)
        assert all(ALPACA.text(record)[1] is None for record in records)
    with pytest.raises(InputError, match=r"with source 'builtin' accepted are None and 'alpaca'"):
        open_source(config(None, source="builtin", formatting="openai"))
