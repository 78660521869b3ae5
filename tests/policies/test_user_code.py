"""Errors inside code of the user's: one line, and where in their code."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import registry
from dataflex_jax.policies.user_code import UserCodeError, user_code

SOURCE = """
import jax.numpy as jnp
import numpy as np

def branches(x):
    if x > 0:
        return x
    return -x

def deeper(x):
    return shapes(x)

def shapes(x):
    return jnp.zeros(3) + jnp.zeros((x.shape[0] + 1,))

def numpys(x):
    return np.asarray(x)

def silent(x):
    raise AssertionError
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "users_functions.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("users_functions")


def error_of(function):
    def called(x):
        with user_code("mixer 'mine': update"):
            return function(x)

    with pytest.raises(UserCodeError) as caught:
        jax.eval_shape(called, jnp.zeros(1)[0] if function.__name__ == "branches" else jnp.zeros(4))
    return caught.value, str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("name", "raised", "lines"),
    [
        ("branches", "TracerBoolConversionError: Attempted boolean conversion of traced array", ["if x > 0:"]),
        ("numpys", "TracerArrayConversionError: The numpy.ndarray conversion method", ["return np.asarray(x)"]),
        ("deeper", "TypeError: add got incompatible shapes", ["return shapes(x)", "return jnp.zeros(3)"]),
        ("silent", "AssertionError", ["raise AssertionError"]),
    ],
)
def test_it_is_one_line_and_the_users_own_lines(theirs, name, raised, lines):
    error, (line, *places) = error_of(getattr(theirs, name))
    assert line.startswith(f"mixer 'mine': update raised {raised}")
    assert ("it is traced" in line) == raised.startswith("Tracer")
    assert isinstance(error, InputError)
    assert error.__cause__ is not None  # the whole traceback, for whoever calls it from Python
    files = [place for place in places if place.startswith("  File ")]
    # This test's function is outside of the package too.
    assert [file.split('"')[1] for file in files[1:]] == [theirs.__file__] * len(lines)
    shown = [place.strip() for place in places]
    assert all(any(place.startswith(expected) for place in shown) for expected in lines)
    assert not any("site-packages/jax" in place for place in places)


def test_what_is_one_line_already_passes_and_so_does_a_refused_value(theirs):
    def refusing():
        raise InputError("config.data.root: none")

    def impossible():
        raise ValueError("alpha = 2: must be < 1")

    for function, kind in ((refusing, InputError), (impossible, ValueError)):
        with pytest.raises(kind) as caught, user_code("its factory"):
            function()
        assert not isinstance(caught.value, UserCodeError)


def test_a_fault_of_the_package_itself_keeps_its_traceback():
    def inside():
        with user_code("mixer 'odm': its factory"):
            registry._check_type("no parameter", 1)

    inside.__code__ = inside.__code__.replace(co_filename=registry.__file__)
    with pytest.raises(AttributeError, match="'str' object has no attribute 'default'"):
        inside()


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1 +\n", "config.plugins: importing 'users_broken' raised SyntaxError: invalid syntax (users_broken.py"),
        ("missing\n", "config.plugins: importing 'users_broken' raised NameError: name 'missing' is not defined"),
        ("import nothing_of_this_name\n", "config.plugins: cannot import 'users_broken': No module named 'nothing_of"),
    ],
)
def test_a_plugin_that_cannot_be_imported(tmp_path, monkeypatch, source, line):
    (tmp_path / "users_broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        registry.load_plugins(("users_broken",))
    found, *places = str(caught.value).splitlines()
    assert found.startswith(line)
    assert all("importlib" not in place for place in places)
