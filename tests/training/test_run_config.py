"""A run folder's config.json: written, read back, refused, and those that older versions wrote."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from dataflex_jax import config as configuration
from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.training import run_config
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import policy_runs, tiny
from tests.helpers.command import assert_same_curves, copy_of

FIELDS_OF_0_1_0 = (Path(__file__).parent / "fields_of_0_1_0.txt").read_text().split()


def test_what_is_written_reads_back_as_the_same_configuration(tmp_path):
    config = tiny.config(tmp_path / "domains", data__domains=("digits", "code"), data__proportions=(0.25, 0.75))
    run_config.write(config, tmp_path / "config.json")
    restored = run_config.read(tmp_path)
    assert restored.to_dict() == config.to_dict()
    configuration.validate(restored)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["versions"]["jax"]
    assert saved["devices"]["count"] == 8


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_what_is_no_config_of_a_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: (not |cannot be read|a JSON list)"):
        run_config.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", 5, "not the config.json of a run, its config has no model.name_or_path"),
        ("model.from_scratch", "no", "config.model.from_scratch is 'no'; a run has True or False"),
        ("optim.learning_rate", None, "config.optim.learning_rate is None; a run has a number"),
        ("train_step", 1.5, "config.train_step is 1.5; a run has an integer"),
        ("plugins", 3, "config.plugins is 3; a run has a tuple"),
        ("data.tokenizer", ["bytes"], "config.data.tokenizer is .*; a run has a non-empty string"),
        ("lora.rank", True, "config.lora.rank is True; a run has an integer"),
        ("mixer", "odm", "config.mixer is 'odm'; a run has an object, or null"),
        ("mesh", [], "not the config.json of a run, its config has no mesh.data"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(tmp_path, name, value, message):
    run_config.write(base.get_config("mixer=odm"), tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    *sections, field = name.split(".")
    functools.reduce(lambda section, key: section[key], sections, written["config"])[field] = value
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: {message}") as error:
        run_config.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_field_that_is_gone_is_named_unless_older_runs_lack_it(tmp_path):
    run_config.write(base.get_config(), tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    whole = run_config.read(tmp_path).to_dict()
    for name in configuration.CHECKS:
        section, _, field = name.rpartition(".")
        changed = json.loads(json.dumps(written))
        del (changed["config"][section] if section else changed["config"])[field]
        (tmp_path / "config.json").write_text(json.dumps(changed))
        if name not in FIELDS_OF_0_1_0:
            assert run_config.read(tmp_path).to_dict().keys() == whole.keys(), name
            continue
        with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: not .*, its config has no {name}$"):
            run_config.read(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"lora__rank": 2}], ids=["all", "adapters"])
def test_a_run_of_version_0_1_0_is_read_and_goes_on(tmp_path, fields):
    """Its files know neither evaluators nor trainable parameters nor how closely a cache is verified."""
    root = tiny.write_domains(tmp_path / "data" / "domains")
    config = policy_runs.config(root, "odm", **{"train_step": 4, "checkpoint_every": 2} | fields)
    train_and_evaluate(config, tmp_path / "new")
    old = copy_of(tmp_path / "new", tmp_path / "old")
    written = json.loads((old / "config.json").read_text())
    del written["config"]["evaluators"], written["config"]["model"]["trainable"], written["config"]["data"]["verify"]
    (old / "config.json").write_text(json.dumps(written))
    for step in (2, 4):
        # What is not chosen is not mentioned, so that other versions go on from it too.
        saved = json.loads((old / FOLDER / str(step) / "run" / "metadata").read_text())
        assert "model.trainable" not in saved["fields"]
    assert (old / FOLDER / "4").is_dir()

    read = run_config.read(old)
    configuration.validate(read)
    assert read.to_dict() == run_config.read(tmp_path / "new").to_dict()
    assert open_model(old).model.config == open_model(tmp_path / "new").model.config
    assert tiny.evaluated(old) == tiny.records(tmp_path / "new", "eval.jsonl")[-1]["domains"]
    shutil.rmtree(old / FOLDER / "4")
    train_and_evaluate(config, old)
    assert_same_curves(old, tmp_path / "new")
