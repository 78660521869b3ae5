"""Sources by name: what each needs and refuses, and a source of a plugin's own."""

import sys

import numpy as np
import pytest

from dataflex_jax import config as configuration
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.sources import table
from dataflex_jax.data.sources.table import Source, is_instruction, register_source
from dataflex_jax.errors import InputError
from tests.helpers import tiny

PLUGIN = """
from dataflex_jax.data.sources.parts import RecordsPart
from dataflex_jax.data.sources.streams import Stream, TextReader, wanted_domains
from dataflex_jax.data.sources.table import Source, register_source

DOMAINS = {name: tuple({"text": f"{name} {i} " * 9} for i in range(40)) for name in ("odes", "sonnets")}


def streams(data):
    return tuple(
        Stream((RecordsPart(name, DOMAINS[name]),), (), {None: name}, TextReader("text"))
        for name in wanted_domains(data, tuple(DOMAINS), "the verses")
    )


register_source(Source("verses", streams, refuses={"root": "they are in memory"}))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a module that registers the source "verses"."""
    monkeypatch.setattr(table, "_SOURCES", dict(table._SOURCES))
    (tmp_path / "users_verses.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_verses"
    sys.modules.pop("users_verses", None)


def verses(tmp_path, plugin, **fields):
    return tiny.config(tmp_path / "nothing", plugins=(plugin,), data__source="verses", data__root=None, **fields)


def test_a_plugin_may_have_a_source_of_its_own(plugin, tmp_path):
    config = verses(tmp_path, plugin)
    configuration.validate(config)
    domains, tokenizer = open_domains(config.data, progress=False)
    assert [domain.name for domain in domains] == ["odes", "sonnets"]
    tokens = np.asarray(domains[1].store.train.tokens)
    assert tokenizer.decode(tokens[:-1]).startswith("sonnets ")
    assert domains[0].train.num_rows + domains[0].valid.num_rows > 10
    (sonnets,), _ = open_domains(verses(tmp_path, plugin, data__domains=("sonnets",)).data, progress=False)
    assert sonnets.key == domains[1].key


def test_what_a_plugins_source_refuses_is_refused(plugin, tmp_path):
    config = verses(tmp_path, plugin, data__domains=("epics",))
    configuration.validate(config)
    with pytest.raises(InputError, match=r"^config.data.domains: 'epics' is not in the verses; available: odes, sonn"):
        open_domains(config.data, progress=False)
    config.data.root = "somewhere"
    message = r"^config.data.root: not with source 'verses': they are in memory; set it to None$"
    with pytest.raises(InputError, match=message):
        configuration.validate(config)


def test_without_its_plugin_a_source_is_unknown(tmp_path):
    config = tiny.config(tmp_path, data__source="verses")
    with pytest.raises(InputError, match=r"^config.data.source = 'verses': must be one of 'builtin', 'local', "):
        configuration.validate(config)


def test_a_name_belongs_to_the_module_that_registered_it(plugin):
    with pytest.raises(InputError, match=r"source 'hub' of .*test_table is already registered by .*\.hub"):
        register_source(Source("hub", lambda data: ()))
    register_source(Source("mine", lambda data: ()))
    register_source(Source("mine", lambda data: (), instruction=True))
    assert table.source("mine").instruction


@pytest.mark.parametrize(
    ("source", "formatting", "expected"),
    [("local", None, False), ("builtin", "alpaca", True), ("dataset_info", None, True)],
)
def test_which_data_are_conversations(tmp_path, source, formatting, expected):
    config = tiny.config(tmp_path, data__source=source, data__formatting=formatting)
    assert is_instruction(config.data) == expected
