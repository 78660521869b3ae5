"""A run folder's config.json: written, read back, refused, and those that older versions wrote."""

import json
import shutil

import pytest

from dataflex_jax import config as configuration
from dataflex_jax.errors import InputError
from dataflex_jax.training import run_config
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import policy_runs, tiny
from tests.helpers.command import assert_same_curves, copy_of


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
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: not the config.json of a run"):
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
