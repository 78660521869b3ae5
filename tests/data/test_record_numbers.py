"""Weights of records and of turns: read with their defaults, at their tokens, and in whole runs."""

import json

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.record_numbers import record_numbers
from dataflex_jax.errors import InputError
from dataflex_jax.policies.base import RecordNumbers
from dataflex_jax.policies.registry import policy_config
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import policy_runs, tiny, tiny_chat

ROWS = [{"instruction": f"{i}?", "output": "a" * (i + 1), "meta": {"w": w}} for i, w in enumerate((0.5, 2, 0, None, 7))]
CHATS = [
    [("user", "a?", None), ("assistant", "bc", 0.5), ("user", "d?", None), ("assistant", "efg", 2)],
    [("user", "a?", None), ("assistant", "bcde", 0), ("user", "d?", None), ("assistant", "f", 3)],
    [("system", "s", None), ("user", "a?", None), ("assistant", "b", None)],
]


def chat(*turns):
    messages = [{"role": role, "content": text} | ({} if w is None else {"weight": w}) for role, text, w in turns]
    return {"messages": messages}


def data_of(tmp_path, records, **fields):
    """The `data` section for a domain of these records, none of which is held out."""
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    (root / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = tiny_chat.config(root).data
    data.update(valid_fraction=0.0, cutoff_len=200, buckets=(200,), template="alpaca", **fields)
    return data


def numbers_of(data, wanted):
    domains, _ = open_domains(data, progress=False)
    pool = Pool(domains)
    of_row = record_numbers(wanted, pool, data)["record_numbers"]
    return [(pool.row(i), of_row(i)) for i in range(pool.num_rows)]


def test_a_row_has_its_records_number_or_1(tmp_path):
    found = numbers_of(data_of(tmp_path, ROWS), RecordNumbers("meta.w", "record"))
    assert [float(numbers[0]) for _, numbers in found] == [0.5, 2, 0, 1, 7]
    found = numbers_of(data_of(tmp_path, ROWS), RecordNumbers("other.w", "record"))
    assert [float(numbers[0]) for _, numbers in found] == [1, 1, 1, 1, 1]


def test_a_turn_has_its_messages_number_at_its_tokens(tmp_path):
    data = data_of(tmp_path, [chat(*turns) for turns in CHATS], formatting="openai", weight_key="weight")
    found = numbers_of(data, RecordNumbers("weight", "turns"))
    for turns, (row, numbers) in zip(CHATS, found, strict=True):
        assert numbers.shape == row.mask.shape
        assert not numbers[~row.mask].any()
        said = [(len(text) + 1, 1 if w is None else w) for role, text, w in turns if role == "assistant" and w != 0]
        expected = np.concatenate([np.full(count, w) for count, w in said])  # the text and its end
        np.testing.assert_allclose(numbers[row.mask], expected)


def test_of_a_conversation_that_is_cut_off_the_first_turns_are_left(tmp_path):
    data = data_of(tmp_path, [chat(*CHATS[0])], formatting="openai", weight_key="weight")
    (whole, _), *_ = numbers_of(data, RecordNumbers("weight", "turns"))
    data.update(cutoff_len=int(np.flatnonzero(whole.mask)[3]) + 1, buckets=(200,))
    ((row, numbers),) = numbers_of(data, RecordNumbers("weight", "turns"))
    np.testing.assert_array_equal(numbers[row.mask], [0.5] * row.mask.sum())


@pytest.mark.parametrize("value", [-1, "high", True, float("inf"), float("nan"), [1]])
def test_a_value_that_is_no_weight_is_refused_with_its_file_and_line(tmp_path, value):
    data = data_of(tmp_path, [*ROWS[:2], {**ROWS[2], "meta": {"w": value}}])
    with pytest.raises(InputError, match=r"root/a.jsonl:3: 'meta.w' is .*; a finite number >= 0 is expected$"):
        numbers_of(data, RecordNumbers("meta.w", "record"))
    turns = [("user", "a?", None), ("assistant", "b", value)]
    data = data_of(tmp_path, [chat(*CHATS[0]), chat(*turns)], formatting="openai", weight_key="weight")
    with pytest.raises(InputError, match=r"root/a.jsonl:2: message 1 of 'messages': 'weight' is .*; a finite number"):
        numbers_of(data, RecordNumbers("weight", "turns"))


def test_rows_that_have_no_such_numbers_are_refused(tmp_path):
    data = data_of(tmp_path, ROWS)
    with pytest.raises(InputError, match="domain 'a': records of alpaca have no messages with numbers"):
        numbers_of(data, RecordNumbers("weight", "turns"))
    data.packing = True
    with pytest.raises(InputError, match="rows of documents, and packed ones, are no records"):
        numbers_of(data, RecordNumbers("weight", "record"))
    data = data_of(tmp_path, [chat(*CHATS[2])], formatting="openai", train_on_prompt=True)
    with pytest.raises(InputError, match=r"of turns they need config\.data\.train_on_prompt=False"):
        numbers_of(data, RecordNumbers("weight", "turns"))


def weighted(root, of):
    made = tiny_chat.config(root, weighter="field", train_step=10, warmup_step=1, checkpoint_every=4)
    made.update_times = -1
    made.weighter.update(of=of, field="difficulty" if of == "record" else "weight")
    if of == "turns":
        made.data.update(formatting="openai", template="alpaca", cutoff_len=200, buckets=(200,))
    return made


@pytest.mark.parametrize("of", ["record", "turns"])
def test_a_run_goes_on_to_the_bit_and_counts_what_the_records_say(tmp_path, of):
    if of == "record":
        root = tiny_chat.write_questions(tmp_path / "root")
    else:
        root = tmp_path / "root"
        root.mkdir()
        (root / "a.jsonl").write_text("".join(json.dumps(chat(*turns)) + "\n" for turns in CHATS * 20))
    metrics, _ = policy_runs.assert_goes_on(weighted(root, of), tmp_path)
    assert metrics[0]["example_weight_min"] == metrics[0]["example_weight_max"] == 1 or of == "turns"
    np.testing.assert_allclose([line["example_weight_mean"] for line in metrics[1:]], 1, atol=0.5)
    assert metrics[-1]["example_weight_min"] < 0.9 < 1.1 < metrics[-1]["example_weight_max"]


def test_records_that_all_weigh_the_same_change_nothing(tmp_path):
    root = tiny_chat.write_questions(tmp_path / "root")
    lines = {}
    for name in ("field", "none"):
        made = tiny_chat.config(root, weighter=name, train_step=3, warmup_step=0)
        if name == "field":
            made.weighter = policy_config("weighter", "field")
            made.weighter.field = "nothing"
        train_and_evaluate(made, tmp_path / name)
        lines[name] = [line["loss"] for line in tiny.records(tmp_path / name, "metrics.jsonl")]
    np.testing.assert_allclose(lines["field"], lines["none"], rtol=1e-6)
