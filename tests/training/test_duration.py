"""`config.epochs` in place of `config.train_step`."""

import logging

import pytest

from dataflex_jax import config as configuration
from dataflex_jax.configs import base
from dataflex_jax.errors import InputError
from dataflex_jax.training import duration, run_config
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.imports import imported
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import assert_same_curves
from tests.helpers.command_line import chosen


def lasting(epochs, train_step=None):
    config = base.get_config()
    config.update(epochs=epochs, train_step=train_step)
    return config


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 4), (3.0, 10), (0.1, 1), (0.32, 1), (0.33, 2)])
def test_epochs_are_as_many_steps_as_hold_their_rows(epochs, steps, caplog):
    config = lasting(epochs)
    config.data.batch_size = 32
    with caplog.at_level(logging.INFO, "dataflex_jax"):
        duration.settle(config, 100)
    assert (config.train_step, config.epochs) == (steps, None)
    assert f"config.epochs = {epochs:g}: {steps} steps of 32 rows, for 100 training rows" in caplog.text


def test_a_run_of_steps_stays_as_it_is():
    config = lasting(None, 7)
    duration.settle(config, 100)
    assert config.train_step == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lasting(2.0, 7), "^config.epochs = 2.0: not together with config.train_step = 7; set one of them to None$"),
        (lasting(None), "^config.train_step = None: must be a number of steps, or config.epochs of passes$"),
        (lasting(0.0), "^config.epochs = 0.0: must be a number > 0"),
    ],
)
def test_both_neither_or_no_number_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        configuration.validate(config)


def test_more_steps_than_there_can_be_are_refused():
    with pytest.raises(InputError, match=r"^config.epochs = 1e\+30: of 100 rows are \d+ steps of 32 rows; a run has"):
        duration.settle(lasting(1e30), 100)


def test_on_the_command_line_one_takes_the_place_of_the_recipe_s_other(tmp_path):
    config = chosen("--config=configs/odm.py", "--config.epochs=2")
    assert (config.train_step, config.epochs) == (None, 2.0)
    recipe = tmp_path / "recipe.py"
    lines = ["from dataflex_jax.configs import base", "def get_config(variant=''):", "    config = base.get_config()"]
    recipe.write_text("\n".join([*lines, "    config.update(train_step=None, epochs=2.0)", "    return config", ""]))
    config = chosen(f"--config={recipe}", "--config.train_step=9")
    assert (config.train_step, config.epochs) == (9, None)
    with pytest.raises(InputError, match=r"^config.epochs = 2\.0: not together with config.train_step = 9"):
        chosen("--config=configs/odm.py", "--config.epochs=2", "--config.train_step=9")


def test_a_run_of_epochs_is_the_run_of_as_many_steps_and_goes_on_like_it(tmp_path):
    root = tiny.write_domains(tmp_path / "domains", characters=3000)
    config = tiny.config(root, "odm", train_step=None, epochs=0.1, eval_rows=2)
    outcome = train_and_evaluate(config, tmp_path / "epochs")
    steps = run_config.read(tmp_path / "epochs").train_step
    assert outcome.step == steps > 1
    train_and_evaluate(tiny.config(root, "odm", train_step=steps, eval_rows=2), tmp_path / "steps")
    assert_same_curves(tmp_path / "epochs", tmp_path / "steps")
    again = tiny.config(root, "odm", train_step=None, epochs=0.1, eval_rows=2)
    assert train_and_evaluate(again, tmp_path / "epochs").step == steps


def test_weights_are_imported_for_a_run_of_epochs(tmp_path):
    root = tiny.write_domains(tmp_path / "domains", characters=3000)
    train_and_evaluate(tiny.config(root, None, train_step=1, eval_rows=1), tmp_path / "start")
    export_checkpoint(tmp_path / "start", tmp_path / "hf")
    fields = {"model__name_or_path": str(tmp_path / "hf"), "model__from_scratch": False, "eval_rows": 1}
    config = tiny.config(root, None, train_step=None, epochs=0.02, **fields)
    config.data.tokenizer = str(tmp_path / "hf")
    imported(config.copy_and_resolve_references(), tmp_path / "run")
    assert train_and_evaluate(config, tmp_path / "run").step == run_config.read(tmp_path / "run").train_step >= 1
