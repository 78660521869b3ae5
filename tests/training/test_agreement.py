"""What processes compare before they train together, with the others' values made up."""

import importlib
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dataflex_jax.errors import InputError
from dataflex_jax.training import agreement
from tests.helpers import tiny


@pytest.fixture
def two(monkeypatch):
    """Two processes with one device each, this one the first; the values of the second are this one's but for some."""
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 1)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: devices)

    def theirs(**changed):
        def gathered(values):
            return [values, {name: changed.get(name, value) for name, value in values.items()}]

        monkeypatch.setattr(agreement, "_gathered", gathered)
        return devices

    theirs()
    return theirs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 7),
        ("train_step", 13),
        ("checkpoint_every", 5),
        ("eval_every", 1),
        ("data.seq_len", 33),
        ("data.batch_size", 4),
        ("data.grad_accumulation", 2),
        ("data.lag", 0),
        ("data.valid_fraction", 0.3),
        ("data.root", "elsewhere"),
        ("data.proportions", "(1.0, 2.0, 1.0)"),
        ("mixer.alpha", 0.11),
        ("optim.learning_rate", 0.5),
        ("model.num_hidden_layers", 3),
    ],
)
def test_a_field_that_one_process_has_otherwise_is_named(two, field, value):
    config = tiny.config(Path("root"), "odm")
    agreement.agree_on_configuration(config)
    two(**{f"config.{field}": value})
    with pytest.raises(InputError) as error:
        agreement.agree_on_configuration(config)
    line = str(error.value)
    assert line.startswith(f"config.{field} is not the same in all processes: ")
    assert line.endswith(" (process 1); start all of them with the same")


def test_the_cache_may_lie_elsewhere(two):
    two(**{"config.data.cache_dir": "/scratch"})
    agreement.agree_on_configuration(tiny.config(Path("root"), "odm"))


@pytest.mark.parametrize(
    "name", ["the version of jax", "the version of dataflex_jax", "the code of dataflex_jax", "jax_enable_x64"]
)
def test_other_code_is_named(two, name):
    two(**{name: "0"})
    with pytest.raises(InputError, match=f"{name} is not the same in all processes"):
        agreement.agree_on_configuration(tiny.config(Path("root"), "odm"))


def test_the_code_of_plugins_is_compared(two, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_plugin_of_mine.py").write_text("x = 1")
    config = tiny.config(Path("root"), "odm", plugins=("a_plugin_of_mine",))
    monkeypatch.setitem(sys.modules, "a_plugin_of_mine", importlib.import_module("a_plugin_of_mine"))
    before = agreement.plugins(config)
    assert list(before) == ["the code of plugin 'a_plugin_of_mine'"]
    (tmp_path / "a_plugin_of_mine.py").write_text("x = 2")
    assert agreement.plugins(config) != before


def test_another_number_of_devices_is_named(two):
    two().append(types.SimpleNamespace(process_index=1))
    with pytest.raises(InputError, match=r"the number of devices is not .*: 1 \(process 0\); 2 \(process 1\)"):
        agreement.agree_on_configuration(tiny.config(Path("root"), "odm"))


def test_who_has_what():
    seeds = [{"a": 1, "seed": 3}, {"a": 1, "seed": 4}, {"a": 1, "seed": 3}, {"a": 1}]
    assert agreement.difference(seeds) == (
        "seed is not the same in all processes: 3 (processes 0, 2); 4 (process 1); nothing (process 3); start all of "
        "them with the same"
    )
    assert agreement.difference(seeds[:1] * 3) is None
    assert "11 (processes 1, 2, 3, 4, 5, 6, 7, 8, ...)" in agreement.difference([{"a": 0}] + 11 * [{"a": 11}])
    assert agreement.difference([{"a": 1, "b": 2}, {"b": 3, "a": 1, "c": 1}]).startswith("b is not")
    assert agreement.difference([{}, {"a": 1}]).startswith("a is not")
    assert len(agreement.difference([{"a": "x" * 1000}, {"a": "y" * 1000}])) < 300


def test_nested_values_have_dotted_names():
    assert agreement.flattened({"a": {"b": 1, "c": (1, "x")}, "d": None}, "config") == {
        "config.a.b": 1,
        "config.a.c": "(1, 'x')",
        "config.d": None,
    }


def test_what_is_gathered_arrives_as_it_was(monkeypatch):
    sent = []

    def allgather(array):
        sent.append(np.asarray(array))
        # The other process has a longer text.
        other = b'{"name": "\xc3\xa9 and more"}'
        if array.ndim == 0:
            return np.stack([array, np.int32(len(other))])
        padded = np.zeros(array.size, np.uint8)
        padded[: len(other)] = np.frombuffer(other, np.uint8)
        return np.stack([array, padded])

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    assert agreement._gathered({"name": "a"}) == [{"name": "a"}, {"name": "é and more"}]


@pytest.mark.parametrize(("sees", "message"), [(True, None), (False, r"--workdir=.*run: process 1 cannot see what")])
def test_a_run_folder_that_is_not_shared(two, monkeypatch, tmp_path, sees, message):
    folder = tmp_path / "run"

    def gathered(values):
        if "sees" in values:
            assert values["sees"]
            assert len(list(folder.iterdir())) == 1
            return [values, {"sees": sees}]
        return [values, values]

    monkeypatch.setattr(agreement, "_gathered", gathered)
    if message is None:
        agreement.agree_on_run_folder(folder)
    else:
        with pytest.raises(InputError, match=message):
            agreement.agree_on_run_folder(folder)
    assert list(folder.iterdir()) == []


def test_the_second_process_waits_a_while_for_a_file_of_the_first(two, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(agreement, "_SECONDS", 0.2)
    saw = []

    def gathered(values):
        if "sees" in values:
            saw.append(values["sees"])
            return [{"sees": True}, values]
        return [{"folder": "theirs", "made": ".token"}, values]

    monkeypatch.setattr(agreement, "_gathered", gathered)
    with pytest.raises(InputError, match="--workdir=theirs: process 1 cannot see"):
        agreement.agree_on_run_folder(tmp_path)
    (tmp_path / ".token").touch()
    agreement.agree_on_run_folder(tmp_path)
    assert saw == [False, True]


def test_files_of_weights_are_told_apart(tmp_path):
    config = tiny.config(Path("root"), "odm")
    assert agreement.weights(config) == {}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 18))
    with config.unlocked():
        config.model.from_scratch, config.model.name_or_path = False, str(tmp_path)
    before = agreement.weights(config)
    assert list(before) == ["what is in config.model.name_or_path"]
    (tmp_path / "README.md").write_text("theirs")
    assert agreement.weights(config) == before
    (tmp_path / "model.safetensors").write_bytes(bytes((1 << 18) - 1) + b"x")
    assert agreement.weights(config) != before
