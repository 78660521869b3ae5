"""What is said, and what is refused, where a run is started again with another configuration."""

import json
import logging

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.training import changes, run_config
from tests.helpers import tiny


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path, "ado", optim__schedule="cosine")


def with_fields(config, **fields):
    return tiny.having(config.copy_and_resolve_references(), fields)


def test_the_fields_that_differ_are_found(config):
    now = with_fields(config, train_step=24, mixer__history=512, data__proportions=(0.5, 0.25, 0.25))
    assert changes.changed(config, now) == {
        "train_step": (12, 24),
        "mixer.history": (256, 512),
        "data.proportions": (None, (0.5, 0.25, 0.25)),
    }
    assert changes.changed(config, with_fields(config)) == {}
    assert changes.changed(None, config) == {}


def test_a_configuration_is_unchanged_by_its_way_through_the_file(tmp_path, config):
    config = with_fields(config, data__buckets=(8, 16), data__proportions="uniform")
    run_config.write(config, tmp_path / "config.json")
    assert changes.changed(changes.last_started_with(tmp_path), config) == {}


@pytest.mark.parametrize("content", [None, b"", b'{"config": ', b"[]", b'{"versions": {}}', b"\xff\xfe"])
def test_without_a_readable_config_the_run_goes_on_and_it_is_said(tmp_path, caplog, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        assert changes.last_started_with(tmp_path) is None
    assert f"{tmp_path}/config.json: " in caplog.text
    assert "is not known" in caplog.text


@pytest.mark.parametrize("before", ["bytes", "train:400", "some/tokenizer.json"])
def test_a_run_does_not_go_on_with_another_tokenizer_than_is_asked_for(config, before):
    config = with_fields(config, data__tokenizer=before)
    changed = changes.changed(config, with_fields(config, data__tokenizer="train:300"))
    with pytest.raises(InputError, match=rf"config.data.tokenizer = 'train:300': .* started with '{before}'; keep"):
        changes.check_tokenizer(changed)
    changes.check_tokenizer(changes.changed(config, with_fields(config, seed=7)))


def said(caplog, before, now, step=6) -> list[str]:
    with caplog.at_level(logging.INFO, "dataflex_jax"):
        changes.say(changes.changed(before, now), before, now, step)
    return [record.getMessage() for record in caplog.records]


def test_a_longer_run_that_heats_the_learning_rate_again_says_so(caplog, config):
    first, second = said(caplog, config, with_fields(config, train_step=24), step=12)
    assert first == "Changed since the last start: config.train_step = 24 (was 12)."
    assert second == (
        "The learning rate of step 13 is 0.005; as the run was last started it would be 0 (config.train_step)."
    )


@pytest.mark.parametrize("fields", [{"log_every": 5}, {"optim__weight_decay": 0.0}])
def test_what_leaves_the_learning_rate_alone_says_no_more(caplog, config, fields):
    assert len(said(caplog, config, with_fields(config, **fields))) == 1


def test_nothing_is_said_where_nothing_has_changed(caplog, config):
    assert said(caplog, config, with_fields(config)) == []


FOUND = {"mixer/weights": (2,), "mixer/history": (2, 512), "opt_state/0": (), "key": (2,)}


def test_the_field_that_made_the_state_another_is_named(config):
    expected = FOUND | {"mixer/history": (2, 256), "key": ()}
    changed = changes.changed(with_fields(config, mixer__history=512, optim__eps=1e-7), config)
    assert str(changes.other_state(FOUND, expected, changed)) == (
        "config.mixer.history = 256: mixer/history has shape (2, 512) in the checkpoint, and has shape (2, 256) in "
        "this run; set it back to 512, or use a new --workdir"
    )
    changed = {"mixer.ignore": (7, 100), "mixer.history": (512, 256)}
    error = str(changes.other_state(FOUND, expected, changed))
    assert error.startswith("config.mixer.ignore = 100: ")
    assert error.endswith("; set it back to 7, config.mixer.history back to 512, or use a new --workdir")


def test_code_that_makes_another_state_is_named_by_its_section():
    error = changes.other_state(FOUND, FOUND | {"mixer/added": (3,)}, {"train_step": (1, 2)})
    assert str(error).startswith("mixer/added is none in the checkpoint, and has shape (3,) in this run; the code or")
    assert changes.other_state(FOUND, dict(FOUND), {}) is None


def test_earlier_configurations_are_kept(tmp_path, config):
    path = tmp_path / "config.json"
    run_config.write(config, path)
    run_config.write(config, path, 4)
    assert not (tmp_path / run_config.HISTORY).exists()
    run_config.write(with_fields(config, seed=1), path, 8)
    run_config.write(with_fields(config, seed=2), path, 12)
    lines = [json.loads(line) for line in (tmp_path / run_config.HISTORY).read_text().splitlines()]
    assert [(line["until_step"], line["config"]["seed"]) for line in lines] == [(8, 42), (12, 1)]
    assert lines[0]["versions"]["jax"]
    assert json.loads(path.read_text())["config"]["seed"] == 2
