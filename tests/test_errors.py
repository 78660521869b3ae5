import pickle

import pytest
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError, is_out_of_memory


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({}, "no such folder"),
        ({"option": "data.root"}, "config.data.root: no such folder"),
        ({"option": "data.root", "value": "x"}, "config.data.root = 'x': no such folder"),
        ({"option": "data.root", "value": None}, "config.data.root = None: no such folder"),
        ({"option": "--checkpoint", "value": "x"}, "--checkpoint=x: no such folder"),
    ],
)
def test_the_one_line_names_the_option(option, text):
    error = InputError("no such folder", **option)
    assert str(error) == text
    assert error.reason == "no such folder"
    assert str(pickle.loads(pickle.dumps(error))) == text
    assert str(InputError(ValueError("no such folder"), **option)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "'a\\nb'"),
        (ConfigDict({"a": 1}), "a: 1 "),
        pytest.param(10**5000, "int of thousands of digits", id="digits"),
        ("x" * 300, "'" + 196 * "x" + "..."),
    ],
)
def test_a_value_is_shown_on_one_line(value, text):
    assert str(InputError("no", option="seed", value=value)) == f"config.seed = {text}: no"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 8796093022208 bytes."), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."), True),
        (RuntimeError("INVALID_ARGUMENT: no such device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_too_little_memory_is_told_from_other_faults(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_the_fault_of_an_option_by_another_name():
    error = InputError("no such folder", option="data.root", value="x").renamed("targets.root")
    assert str(error) == "config.targets.root = 'x': no such folder"
