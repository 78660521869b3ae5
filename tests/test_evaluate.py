"""evaluate, and the other commands, on checkpoints of every kind."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from dataflex_jax import evaluate
from dataflex_jax.errors import InputError
from dataflex_jax.generate import continuations
from dataflex_jax.models.hf import peft
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import run_config
from dataflex_jax.training.exporting import export_adapter, export_checkpoint
from dataflex_jax.training.locate import RunStep
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import How, open_model
from tests.helpers import tiny
from tests.helpers.command import Trainer, in_forks, the_error


class Checkpoints(NamedTuple):
    """The same run in the format of each kind, and adapters on it."""

    run: str
    hf: str
    adapted: str
    peft: str


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def checkpoints(trainer):
    """On one device, as the commands run."""
    made = Checkpoints(*(str(trainer.folder / name) for name in Checkpoints._fields))
    trainer.done("--config.train_step=2", workdir=made.run)
    export_checkpoint(made.run, trainer.folder / "hf")
    config = tiny.config(trainer.root, "odm", train_step=2, lora__rank=2, lora__base_dtype="float32")
    config.model.update(name_or_path=made.hf, from_scratch=False)
    config.data.tokenizer = made.hf
    train_and_evaluate(config, trainer.folder / "adapted")
    export_adapter(made.adapted, trainer.folder / "peft")
    return made


@pytest.fixture(scope="module")
def results(trainer, checkpoints, tmp_path_factory):
    """What the commands did, by name."""
    run, hf, adapted, peft_folder = (f"--checkpoint={each}" for each in checkpoints)
    recipe = f"--config={trainer.recipe}"
    again = shutil.copytree(checkpoints.run, trainer.folder / "again")
    selector = f"--config={_selecting(trainer)}"
    output = trainer.folder / "outputs"
    prompt = ("--prompt=012", "--max_new_tokens=4")
    calls = {
        "evaluate the run": ("evaluate", f"--checkpoint={again}"),
        "evaluate one step": ("evaluate", f"--checkpoint={again}/checkpoints/2", recipe),
        "evaluate hf": ("evaluate", hf, recipe),
        "evaluate adapted": ("evaluate", adapted),
        "evaluate peft": ("evaluate", peft_folder, recipe),
        "evaluate hf without data": ("evaluate", hf),
        "evaluate nothing": ("evaluate", recipe),
        "evaluate without tasks": ("evaluate", run, "--limit=3"),
        "evaluate no questions": ("evaluate", run, "--tasks=mmlu", "--limit=0"),
        "evaluate no checkpoint": ("evaluate", f"--checkpoint={trainer.folder}", recipe),
        "generate run": ("generate", run, *prompt),
        "generate hf": ("generate", hf, *prompt),
        "generate peft": ("generate", peft_folder, *prompt),
        "export peft's adapter": ("export", peft_folder, f"--output={output}/adapter", "--adapter"),
        "export peft merged": ("export", peft_folder, f"--output={output}/merged"),
        "export hf's adapter": ("export", hf, f"--output={output}/none", "--adapter"),
        "select run": ("select", run, selector, f"--output={output}/run.npz"),
        "select hf": ("select", hf, selector, f"--output={output}/hf.npz"),
        "select peft": ("select", peft_folder, selector, f"--output={output}/peft.npz"),
        "select mixed": ("select", f"{run},{checkpoints.hf}", selector, f"--output={output}/mixed.npz"),
        "select weighted": (
            "select",
            f"{run},{checkpoints.peft}",
            selector,
            f"--output={output}/weighted.npz",
            "--checkpoint_weights=2,0.5",
        ),
        "select adam": (
            "select",
            hf,
            selector,
            f"--output={output}/adam.npz",
            "--config.selector.gradient_type=adam",
        ),
    }
    done = in_forks(
        trainer,
        tmp_path_factory.mktemp("forks"),
        [(f"dataflex_jax.{command}", *arguments) for command, *arguments in calls.values()],
    )
    return dict(zip(calls, done, strict=True))


def _selecting(trainer):
    recipe = trainer.folder / "selecting.py"
    recipe.write_text(
        "from pathlib import Path\nfrom tests.helpers import tiny, tiny_chat\n\n"
        "def get_config():\n"
        f"    config = tiny.config(Path({str(trainer.root)!r}), None, model__remat='none')\n"
        "    fields = {'selector__gradient_type': 'sgd', 'sweep__batch_rows': 64}\n"
        "    return tiny_chat.with_policies(config, fields, selector='less')\n"
    )
    return recipe


def figures(result):
    """Domain -> its line of numbers in the table."""
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[2:6]
    return {name: [float(x) for x in numbers] for name, *numbers in map(str.split, lines)}


def refused(result):
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    return the_error(result).removeprefix("error: ")


@pytest.mark.slow
def test_evaluating_a_run_prints_and_writes_what_it_evaluated(trainer, checkpoints, results):
    folder = trainer.folder / "again"
    record = tiny.records(trainer.folder / "run", "eval.jsonl")[-1]
    assert json.loads((folder / "evaluation.json").read_text()) == record
    result = results["evaluate the run"]
    assert result.stdout.startswith(f"Step 2 of {folder}, held out:\n{evaluate.table(record)}\n")
    assert result.stdout.endswith(f"\nWritten to {folder}/evaluation.json.\n")
    with_recipe = results["evaluate one step"]
    assert figures(with_recipe) == figures(result)
    assert with_recipe.stdout.endswith(f"\nWritten to {folder}/evaluation-{Path(trainer.recipe).stem}.json.\n")


@pytest.mark.slow
def test_evaluating_a_pretrained_model_needs_a_recipe_for_the_data(checkpoints, results):
    result = results["evaluate hf"]
    assert figures(result) == figures(results["evaluate the run"])
    assert result.stdout.startswith(f"{checkpoints.hf}, held out:\n")
    assert "Written" not in result.stdout
    assert refused(results["evaluate hf without data"]).startswith("--config is missing: a Hugging Face checkpoint has")
    assert refused(results["evaluate nothing"]).startswith("--checkpoint is missing: a run folder, the folder of one")
    assert refused(results["evaluate without tasks"]).startswith("--limit is for --tasks, which is missing")
    assert refused(results["evaluate no questions"]) == "--limit=0.0: must be a number > 0"
    assert "neither a run folder" in refused(results["evaluate no checkpoint"])


def test_where_no_evaluator_is_named_it_is_the_held_out_loss(trainer, tmp_path):
    train_and_evaluate(tiny.config(trainer.root, train_step=1), tmp_path)
    config = run_config.read(tmp_path)
    opened = open_model(tmp_path, make_mesh(config.mesh))
    expected = evaluate.evaluate(opened, config)
    assert [record["split"] for record in expected] == ["valid"]
    config.evaluators = ()
    assert evaluate.evaluate(opened, config) == expected


def test_the_table_of_an_evaluator_has_every_metric_of_it():
    record = {
        "split": "quiz",
        "domains": {"algebra": {"accuracy": np.float32(0.5), "samples": 10}, "law": {"samples": 1234567}},
        "overall": {"a_metric_with_a_long_name": 1 / 3},
    }
    assert evaluate.table(record).splitlines() == [
        "                   accuracy    samples a_metric_with_a_long_name",
        "algebra                 0.5         10                          ",
        "law                            1234567                          ",
        "overall                                                 0.333333",
    ]


@pytest.mark.slow
def test_evaluating_adapters_is_evaluating_the_adapted_model(results):
    assert figures(results["evaluate peft"]) == figures(results["evaluate adapted"])
    assert figures(results["evaluate peft"]) != figures(results["evaluate hf"])


@pytest.mark.slow
def test_generating_from_a_pretrained_model(checkpoints, results):
    run, hf, adapted = (results[f"generate {each}"] for each in ("run", "hf", "peft"))
    assert run.returncode == hf.returncode == adapted.returncode == 0, hf.stderr + adapted.stderr
    for result, source in ((run, checkpoints.run), (hf, checkpoints.hf), (adapted, checkpoints.peft)):
        # On one device, as the command.
        opened = open_model(source, make_mesh({}, jax.devices()[:1]))
        (expected,) = continuations(opened, ["012"], max_new_tokens=4)
        assert result.stdout == f"012{expected}\n\n"


@pytest.mark.slow
def test_exporting_a_pretrained_model(trainer, checkpoints, results):
    result = results["export peft's adapter"]
    assert result.returncode == 0, result.stderr
    outputs = trainer.folder / "outputs"
    assert result.stdout == f"{checkpoints.peft} is now a PEFT adapter in {outputs / 'adapter'}.\n"
    how = How(dtype="float32")
    ours, theirs = open_model(outputs / "adapter", how=how).model, open_model(checkpoints.peft, how=how).model
    assert ours.config.lora == theirs.config.lora
    np.testing.assert_array_equal(
        ours.params["layers"]["mlp"]["up_proj"]["lora_b"], theirs.params["layers"]["mlp"]["up_proj"]["lora_b"]
    )
    assert (outputs / "adapter" / peft.WEIGHTS).is_file()
    assert results["export peft merged"].returncode == 0, results["export peft merged"].stderr
    merged = open_model(outputs / "merged", how=how).model
    expected = theirs.without_adapters()
    np.testing.assert_allclose(
        merged.params["layers"]["mlp"]["up_proj"]["kernel"],
        expected.params["layers"]["mlp"]["up_proj"]["kernel"],
        atol=1e-6,
    )
    assert refused(results["export hf's adapter"]).endswith("has no adapters, all parameters were trained")


def scores(trainer, name):
    return dict(np.load(trainer.folder / "outputs" / f"{name}.npz"))["all_scores"]


@pytest.mark.slow
def test_selecting_with_pretrained_models(trainer, results):
    for name in ("run", "hf", "peft", "weighted"):
        result = results[f"select {name}"]
        assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(scores(trainer, "hf"), scores(trainer, "run"), rtol=1e-5, atol=1e-6)
    assert np.abs(scores(trainer, "peft") - scores(trainer, "hf")).max() > 1e-3
    error = refused(results["select adam"])
    assert error.startswith("there is no Adam state to precondition the gradients with: give a run's checkpoint")


@pytest.mark.slow
def test_checkpoints_of_several_kinds_need_weights(trainer, checkpoints, results):
    expected = f"--checkpoint_weights is missing: {checkpoints.hf} is no run's checkpoint and has no learning rate"
    assert refused(results["select mixed"]) == expected
    assert results["select weighted"].returncode == 0


def test_that_the_run_folder_cannot_be_written_is_said_before_the_work(tmp_path, caplog):
    read_only = RunStep(Path("/proc"), 3)
    with caplog.at_level("WARNING"):
        assert evaluate._output(read_only, None, None) is None
    assert "/proc/evaluation.json will not be written: /proc: " in caplog.text
    assert "--output=FILE" in caplog.text
    assert evaluate._output(RunStep(tmp_path, 3), None, None) == tmp_path / "evaluation.json"
    assert evaluate._output(read_only, str(tmp_path / "new" / "e.json"), None) == tmp_path / "new" / "e.json"
    with pytest.raises(InputError, match=r"^--output=/proc/e.json: cannot be written \(/proc: .*\); choose another"):
        evaluate._output(RunStep(tmp_path, 3), "/proc/e.json", None)
    assert evaluate._output(None, None, None) is None


def test_what_a_recipes_data_give_is_not_the_runs_own_evaluation(tmp_path):
    run = RunStep(tmp_path, 3)
    assert evaluate._output(run, None, "odm-local") == tmp_path / "evaluation-odm-local.json"
    long = evaluate._output(run, None, "odm-" + "plugins-" * 50)
    assert long.name.startswith("evaluation-odm-plugins-")
    assert len(long.name) < 143
    assert evaluate._output(run, str(tmp_path / "e.json"), "odm-local") == tmp_path / "e.json"
    assert evaluate._output(None, None, "odm-local") is None
