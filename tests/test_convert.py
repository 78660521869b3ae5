"""`python -m dataflex_jax.convert` and `--config=FILE.yaml`, and the way of somebody who comes from LLaMA-Factory."""

import json
import subprocess
import sys

import pytest
import yaml

from dataflex_jax import convert
from dataflex_jax.errors import InputError
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import moving, tiny
from tests.helpers.command import Trainer
from tests.helpers.command_line import chosen, parsed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a file for `less`."""
    monkeypatch.chdir(tmp_path)
    moving.write_components(tmp_path)
    fields = {"train_type": "dynamic_select", "component_name": "less", "eval_dataset": "t"}
    moving.write(tmp_path, moving.SFT | moving.DYNAMIC | fields)
    return tmp_path


def converted(*arguments):
    flags = [argument for argument in arguments if argument.startswith("--")]
    files = [argument for argument in arguments if not argument.startswith("--")]
    with parsed(*flags, command=convert):
        convert.main(["convert", *files])


def test_the_recipe_is_written_with_what_is_not_as_there(folder, capsys):
    converted("run.yaml", "--devices=4", "--output=mine.py")
    said = capsys.readouterr().out
    assert said.startswith("Not as there:\n  run.yaml:")
    assert "\nWithout effect here:\n  run.yaml:2: trust_remote_code: nobody's code is run\n" in said
    assert said.endswith("Written to mine.py; python -m dataflex_jax.train --config=mine.py runs it.\n")
    assert chosen("--config=mine.py").data.batch_size == 2 * 4 * 4
    converted("run.yaml", "--devices=4", "--output=mine.py")  # which changes nothing
    with pytest.raises(InputError, match=r"^--output=mine.py: exists already; remove it, or choose another$"):
        converted("run.yaml", "--output=mine.py")


def test_without_a_file_or_with_two_nothing_is_converted(folder):
    for files in ((), ("run.yaml", "run.yaml")):
        with pytest.raises(InputError, match=r"^give one file: python"):
            converted(*files)


def test_a_yaml_file_is_a_recipe_of_every_command(folder, caplog):
    plain = chosen("--config=run.yaml")
    assert (plain.selector.name, plain.data.batch_size) == ("less", 8)
    other = chosen("--config=run.yaml:devices=2,weighter=loss", "--config.selector.proj_dim=64", "--config.epochs=2")
    assert (other.weighter.name, other.data.batch_size, other.selector.proj_dim) == ("loss", 16, 64)
    assert (other.epochs, other.train_step) == (2.0, None)
    with pytest.raises(InputError, match="devices=N is a number of devices, 1 or more"):
        chosen("--config=run.yaml:devices=0")
    (folder / "run.yaml").write_text("stage: dpo\ndo_train: true\n")
    with pytest.raises(InputError, match=r"run.yaml:1: stage = 'dpo': accepted: sft, pt"):
        chosen("--config=run.yaml")


ALPACA = [{"instruction": f"Say {word}.", "input": "", "output": word * 3} for word in ("ab", "cd", "ef", "gh") * 8]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"{a}+{b}?"}, {"from": "gpt", "value": str(a + b)}]}
    for a in range(6)
    for b in range(6)
]


@pytest.mark.slow
def test_the_way_of_a_stranger(tmp_path):
    """A folder as LLaMA-Factory has it, the YAML of an example -> a recipe, a run, its evaluation, its page."""
    root = tmp_path / "LLaMA-Factory"
    (root / "data").mkdir(parents=True)
    (root / "examples" / "train_lora").mkdir(parents=True)
    start = tiny.config(tiny.write_domains(tmp_path / "domains", characters=3000), None, train_step=1, eval_rows=1)
    train_and_evaluate(start, tmp_path / "start")
    export_checkpoint(tmp_path / "start", root / "models" / "tiny")
    (root / "data" / "alpaca_en_demo.json").write_text(json.dumps(ALPACA))
    (root / "data" / "sums.json").write_text(json.dumps(SHAREGPT))
    entries = {
        "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
        "sums": {"file_name": "sums.json", "formatting": "sharegpt"},
        "images": {"hf_hub_url": "nobody/images", "columns": {"images": "images"}},
    }
    (root / "data" / "dataset_info.json").write_text(json.dumps(entries))
    fields = {
        **moving.SFT,
        "model_name_or_path": "models/tiny",
        "template": "alpaca",
        "cutoff_len": 256,
        "dataset": "alpaca_en_demo,sums",
        "dataset_dir": ...,
        "num_train_epochs": 2.0,
        "val_size": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "logging_steps": 1,
        "bf16": False,
        "per_device_train_batch_size": 1,
        "output_dir": "saves/tiny/lora/sft",
        "plot_loss": True,
        "overwrite_output_dir": True,
    }
    given = {name: value for name, value in fields.items() if value is not ...}
    (root / "examples" / "train_lora" / "tiny.yaml").write_text(yaml.safe_dump(given))
    environment = Trainer(tmp_path / "trainer").environment(1, {"HOME": str(tmp_path)})

    def run(command, *arguments):
        call = [sys.executable, "-m", f"dataflex_jax.{command}", *arguments]
        done = subprocess.run(call, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("convert", "examples/train_lora/tiny.yaml", "--output=tiny.py")
    run("train", "--config=tiny.py", "--workdir=runs/tiny")
    rows = len(ALPACA) + len(SHAREGPT)
    lines = tiny.records(root / "runs" / "tiny", "metrics.jsonl")
    assert 2 * 0.6 * rows / 4 < lines[-1]["step"] <= -(-2 * rows // 4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "alpaca_en_demo" in run("evaluate", "--checkpoint=runs/tiny")
    run("report", "runs/tiny", "--output=report.html")
    assert "<html" in (root / "report.html").read_text()[:1000]
    run("train", "--config=examples/train_lora/tiny.yaml", "--workdir=runs/direct", "--config.train_step=2")
    assert tiny.records(root / "runs" / "direct", "metrics.jsonl")[-1]["step"] == 2
