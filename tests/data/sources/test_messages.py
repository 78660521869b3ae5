"""Messages: what records say of the loss is honoured or refused by name; older and filled-in forms of calls."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex_jax.data.sources.instruct import MAX_CONVERSATION_BYTES, Conversation, ConversationReader
from dataflex_jax.data.sources.messages import MARKS
from dataflex_jax.data.sources.table import open_source
from dataflex_jax.data.stores.examples import open_example_stores
from dataflex_jax.errors import InputError
from tests.data.sources.test_instruct import assistant, config, user
from tests.helpers import tiny

OPENAI = ConversationReader.usual("openai")


def problem(*messages, reader=OPENAI, **fields):
    return reader.text({"messages": list(messages), **fields})[1]


def targets(*messages):
    made = OPENAI.conversation({"messages": list(messages)}).messages
    return [message.get("target", True) for message in made if message["role"] == "assistant"]


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (0.0, 1.0), (False, True)])
def test_marks_say_which_answers_are_learnt(key, no, yes):
    turns = [user("q") | {key: no}, assistant("bad", **{key: no}), user("q"), assistant("good", **{key: yes})]
    assert targets(*turns, user("q"), assistant("also")) == [False, True, True]
    assert targets(user("q"), assistant("a", **{key: None})) == [True]
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: no}]}
    assert not ConversationReader.usual("sharegpt").conversation(sharegpt).messages[1]["target"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            assistant("a", weight=0.5),
            "message 1 of 'messages': 'weight' is 0.5; must be 0 or false (context only) or 1",
        ),
        (assistant("a", train="yes"), "'train' is 'yes'; must be"),
        (assistant("a", loss=float("nan")), "'loss' is nan; must be"),
        (assistant("a", weight=1, train=False), "weight and train contradict each other"),
        (assistant("a", loss_mask=[1]), "the key 'loss_mask' is not supported; what is learnt is said by weight, "),
        (assistant("a", trainable=True), "the key 'trainable' is not supported"),
        (assistant("a", lossWeight=1), "the key 'lossWeight' is not supported"),
        (assistant("a", training_detail=[]), "the key 'training_detail' is not supported"),
        (assistant("a", label="x"), "the key 'label' is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(message, said):
    assert said in problem(user("q"), message)
    assert "\n" not in problem(user("q"), message)


def test_only_the_assistants_messages_can_ask_to_be_learnt():
    assert "'weight' is 1; only the assistant's messages are learnt, not a user's" in problem(
        user("q") | {"weight": 1}, assistant("a")
    )


def test_neutral_keys_pass():
    more = {"name": "x", "id": 3, "refusal": None, "timestamp": "t", "lang": "en", "constraint": 1, "strain": 2}
    assert problem(user("q") | more, assistant("a", **more)) is None


def test_the_older_form_of_function_calls():
    record = {
        "messages": [
            user("1+1?"),
            assistant(None, function_call={"name": "add", "arguments": '{"a": 1}'}),
            {"role": "function", "name": "add", "content": "2"},
            assistant("two", function_call=None),
        ],
        "functions": [{"name": "add", "parameters": {}}],
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "000000000"}
    made = OPENAI.conversation(record)
    assert made.messages[1:3] == [
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "000000000"},
    ]
    assert made.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


CALLS = [
    {"type": "function", "function": {"name": n, "arguments": a}} for n, a in (("f", {"x": 1}), ("g", {"y": None}))
]
TOOLS = [
    {"type": "function", "function": {"name": n, "parameters": {"properties": {p: {"default": None, "enum": ["e"]}}}}}
    for n, p in (("f", "x"), ("g", "y"))
]
CALLING = {"messages": [user("q"), assistant(None, tool_calls=CALLS)], "tools": TOOLS}


def read(root, **fields):
    (stream,) = open_source(config(root, **{"source": "local", "formatting": "openai"} | fields))
    (document,) = stream.documents(stream.train[0])
    conversation = Conversation.from_json(document.text)
    arguments = [call["function"]["arguments"] for call in conversation.messages[-1]["tool_calls"]]
    return arguments, [tool["function"]["parameters"]["properties"] for tool in conversation.tools]


def test_nulls_that_a_table_filled_in_are_left_out(tmp_path):
    for name in ("json", "table", "hub"):
        (tmp_path / name).mkdir()
    (tmp_path / "json" / "a.jsonl").write_text(json.dumps(CALLING))
    assert read(tmp_path / "json") == (
        [{"x": 1}, {"y": None}],
        [{"x": {"default": None, "enum": ["e"]}}, {"y": {"default": None, "enum": ["e"]}}],
    )
    pq.write_table(pa.Table.from_pylist([CALLING]), tmp_path / "table" / "a.parquet")
    filled = ([{"x": 1}, {}], [{"x": {"enum": ["e"]}}, {"y": {"enum": ["e"]}}])
    assert read(tmp_path / "table") == filled
    datasets.Dataset.from_list([CALLING]).save_to_disk(str(tmp_path / "hub"))
    assert read(tmp_path / "hub", source="hub", hub_config=None, hub_split="train") == filled


def test_what_json_has_no_form_for_is_a_bad_record():
    calls = [{"name": "f", "arguments": {"when": np.datetime64("now")}}]
    assert "calls or tools have no JSON form" in problem(user("q"), assistant("", tool_calls=calls))
    deep = "[" * 500 + "]" * 500
    assert "not valid JSON: nested deeper" in problem(user("q"), assistant("a"), tools=deep)
    call = {"name": "f", "arguments": deep}
    assert "arguments of 'f': not valid JSON: nested deeper" in problem(user("q"), assistant("", tool_calls=[call]))
    assert "a conversation of over 16 MiB" in problem(user("q"), assistant("x" * MAX_CONVERSATION_BYTES))


def stored(root, **fields):
    fields = {"formatting": "openai", "template": "qwen", "cutoff_len": 512, "valid_fraction": 0.0} | fields
    data = tiny.config(root, **{f"data__{name}": value for name, value in fields.items()}).data
    (store,), tokenizer = open_example_stores(data, progress=False)
    learnt = [store.train.example(i) for i in range(store.train.num_documents)]
    return store, [tokenizer.decode(tokens[targets]) for tokens, targets in learnt]


def write(root, *conversations):
    root.mkdir(exist_ok=True)
    (root / "a.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    return root


def test_marks_decide_the_targets_and_an_example_without_any_is_counted(tmp_path):
    marked = [user("q"), assistant("bad", weight=0), user("q"), assistant("good", weight=1)]
    root = write(tmp_path / "root", marked, [user("q"), assistant("none", train=False)], [user("q"), assistant("a")])
    store, learnt = stored(root)
    assert learnt == ["good<|im_end|>", "a<|im_end|>"]
    meta = json.loads((tmp_path / store.path / "meta.json").read_text())
    assert (meta["untargeted_examples"], meta["marked"]) == (1, True)
    assert stored(write(tmp_path / "root", marked[:2] + marked[2:]), mask_history=True)[1] == ["good<|im_end|>"]
    with pytest.raises(InputError, match=r"a.jsonl:1: a message is marked as context only, which data.train_on_prompt"):
        stored(root, train_on_prompt=True)
    with pytest.raises(InputError, match=r"has no training documents; 1 examples have no target"):
        stored(write(tmp_path / "none", marked[:2]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"name": "f", "parameters": {"a": 1}}, "must be called 'arguments'; the call has name, parameters"),
        ({"type": "function", "function": {"name": "f", "input": {}}}, "the call has name, input"),
        ({"name": "f", "arguments": [1]}, "arguments of 'f': must be an object, or its JSON, but is list"),
        ({"name": "f", "arguments": "3"}, "must be an object, or its JSON, but is int"),
    ],
)
def test_arguments_of_a_call_are_an_object_and_never_lost(call, said):
    assert said in problem(user("q"), assistant("", tool_calls=[call]))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
    assert said in ConversationReader.usual("sharegpt").text({"conversations": sharegpt})[1]


@pytest.mark.parametrize("arguments", [{}, None, "", "null", "{}"])
def test_a_call_may_have_no_arguments(arguments):
    call = {"name": "f", "arguments": arguments}
    made = OPENAI.conversation({"messages": [user("q"), assistant("", tool_calls=[call, {"name": "g"}])]})
    assert [call["function"]["arguments"] for call in made.messages[1]["tool_calls"]] == [{}, {}]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_have_one_name(tmp_path, key):
    record = {"messages": [user("q"), assistant("a", **{key: "hm"})]}
    assert OPENAI.conversation(record).messages[1]["reasoning_content"] == "hm"
    store, _ = stored(write(tmp_path / "root", record["messages"]))
    meta = json.loads((tmp_path / store.path / "meta.json").read_text())
    assert meta.get("marked", False) == (key != "reasoning_content")


def test_only_data_with_marks_has_another_key(tmp_path):
    """Stores that were built before marks were read stay in use where there are none."""
    store, _ = stored(write(tmp_path / "plain", [user("q"), assistant("a")]))
    assert "marked" not in json.loads((tmp_path / store.path / "meta.json").read_text())
