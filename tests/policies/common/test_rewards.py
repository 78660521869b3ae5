"""Rewards: what each says of a response, what is refused at the start, and what is said of a bad one."""

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import Exchange, Task
from dataflex_jax.policies.common.rewards import reward

CASES = [
    ("exact_match", " Paris\n", "Paris", 1),
    ("exact_match", "a  b", "a b", 1),
    ("exact_match", "paris", "Paris", 0),
    ("exact_match", "3.5", "35", 0),
    ("contains", "It is PARIS, of course.", "Paris", 1),
    ("contains", "There are 14.", "4", 0),
    ("contains", "New, York", "New York", 0),
    ("contains", "答案是北京。", "北京", 1),
    ("token_f1", "the cat sat", "The cat", 0.8),
    ("token_f1", "dog", "cat", 0),
    ("token_f1", "", "cat", 0),
    ("token_f1", "a a b", "a b b", 2 / 3),
    ("multiple_choice", "B", "B", 1),
    ("multiple_choice", "(B) because", "B. Paris", 1),
    ("multiple_choice", "A cat. So the answer is B.", "B", 1),
    ("multiple_choice", "Either (A) or, better, (C)", "C", 1),
    ("multiple_choice", "Answer: D", "(D)", 1),
    ("multiple_choice", "A cat", "A", 0),
    ("multiple_choice", "", "A", 0),
]


def of(name, pattern=None):
    return reward(name, pattern).of


@pytest.mark.parametrize(("name", "response", "reference", "expected"), CASES)
def test_rules(name, response, reference, expected):
    assert of(name)("?", response, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pattern", "response", "reference", "expected"),
    [
        (r"^\{.*\}$", "{1}", "", 1),
        (r"^\{.*\}$", "1", "", 0),
        (r"#### (-?\d+)", "so 3 #### 2 no #### 42", "thus #### 42", 1),
        (r"#### (-?\d+)", "#### 42", "42 ", 1),
        (r"#### (-?\d+)", "42", "#### 42", 0),
        (r"(yes)|no", "no", "yes", 0),
    ],
)
def test_a_pattern_is_found_or_finds_what_it_finds_in_the_reference(pattern, response, reference, expected):
    assert of("regex", pattern)("?", response, reference) == expected


def test_references_are_needed_by_what_compares_with_them():
    compares = {name: reward(name, None).compares for name in ("exact_match", "token_f1", "hf:x", "os.path:join")}
    assert compares == {"exact_match": True, "token_f1": True, "hf:x": False, "os.path:join": False}
    assert not reward("regex", "a").compares
    assert reward("regex", "(a)").compares


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of rewards, by name."""
    (tmp_path / "own_rewards.py").write_text(
        "import math\n"
        "def length(prompt, response, reference):\n    return len(response)\n"
        "def bad(prompt, response, reference):\n    return {'nan': math.nan, 'none': None, 'text': 'x'}[response]\n"
        "def fails(prompt, response, reference):\n    return 1 / len(response)\n"
        "def narrow(prompt):\n    return 0\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import nothing_like_it\n")
    monkeypatch.syspath_prepend(tmp_path)


def exchanges(*responses):
    return [Exchange(Task(i, f"record {i} of 'a'", "?", "!"), text, f"?{text}") for i, text in enumerate(responses)]


def test_functions_of_the_users_own(module):
    found = reward("own_rewards:length", None).rewards(exchanges("abc", ""), None)
    np.testing.assert_array_equal(found, [3, 0])


@pytest.mark.parametrize("value", [True, np.float32(1), np.array([1.0]), jnp.float32(1)])
def test_numbers_of_any_kind_are_rewards(value):
    assert reward("exact_match", None)._replace(of=lambda *_: value).rewards(exchanges("x"), None).tolist() == [1.0]


@pytest.mark.parametrize(("response", "returned"), [("nan", "nan"), ("none", "None"), ("text", "'x'")])
def test_what_is_no_finite_number_is_refused_with_the_example(module, response, returned):
    match = rf"^reward 'own_rewards:bad' of a response to record 0 of 'a' returned {returned}; a finite number"
    with pytest.raises(InputError, match=match):
        reward("own_rewards:bad", None).rewards(exchanges(response), None)


def test_what_a_function_raises_is_one_line_with_the_example_and_the_place(module):
    with pytest.raises(InputError) as error:
        reward("own_rewards:fails", None).rewards(exchanges("x", ""), None)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "reward 'own_rewards:fails' of a response to record 1 of 'a' raised ZeroDivisionError: division by zero"
    )
    assert "own_rewards.py" in lines[1]


@pytest.mark.parametrize("name", ["exact_match", "contains", "token_f1", "multiple_choice", "regex"])
def test_an_empty_reference_is_refused_by_its_record(name):
    chosen = reward(name, "(a)" if name == "regex" else None)
    tasks = [Task(0, "record 3 of 'a'", "?", "ok"), Task(1, "record 4 of 'a'", "?", " \n")]
    with pytest.raises(InputError, match=rf"^reward '{name}': the reference of record 4 of 'a' is empty"):
        chosen.check(tasks, None)
    chosen.check(tasks[:1], None)


@pytest.mark.parametrize(
    ("name", "pattern", "refusal"),
    [
        ("bleu", None, "reward = 'bleu': must be one of exact_match, .*, regex, or module:function, or hf:CHECKPOINT"),
        ("", None, "reward = ''"),
        ("hf:", None, "reward = 'hf:'"),
        ("a b:c", None, "reward = 'a b:c'"),
        ("no_such_module:f", None, "reward = 'no_such_module:f': cannot import 'no_such_module'"),
        ("broken_rewards:f", None, "reward = 'broken_rewards:f': cannot import 'broken_rewards' .*nothing_like_it"),
        ("own_rewards:missing", None, "reward = .*must be a function of"),
        ("own_rewards:number", None, "reward = .*must be a function of"),
        ("own_rewards:narrow", None, r"reward = .*must be a function of \(prompt, response, reference\)"),
        ("regex", None, "pattern = None: must be a regular expression"),
        ("regex", "(", "pattern = '\\(': is no regular expression"),
        ("contains", "a", "pattern = 'a': must be None"),
    ],
)
def test_impossible_rewards_are_refused_at_the_start(module, name, pattern, refusal):
    with pytest.raises(ValueError, match=f"^{refusal}"):
        reward(name, pattern)
