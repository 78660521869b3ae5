import pickle

import pytest

from dataflex_jax.errors import InputError


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


def test_the_fault_of_an_option_by_another_name():
    error = InputError("no such folder", option="data.root", value="x").renamed("targets.root")
    assert str(error) == "config.targets.root = 'x': no such folder"
