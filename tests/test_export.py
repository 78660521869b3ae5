"""`python -m dataflex_jax.export`: both ways, and what it refuses."""

import subprocess
import sys

import pytest

from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import PROJECT, Trainer, the_error


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    train_and_evaluate(tiny.config(root, train_step=4), folder)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """That run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported")
    export_checkpoint(trained, folder)
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """python -m dataflex_jax.export in a process of its own."""
    trainer = Trainer(tmp_path_factory.mktemp("command"))

    def run(*arguments):
        command = [sys.executable, "-m", "dataflex_jax.export", *map(str, arguments)]
        return subprocess.run(command, cwd=PROJECT, env=trainer.environment(1, {}), capture_output=True, text=True)

    run.recipe = trainer.recipe
    return run


def test_the_command_works_both_ways(command, trained, exported, tmp_path):
    result = command(f"--checkpoint={trained}", f"--output={tmp_path / 'hf'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"Step 4 of {trained} is now a Hugging Face checkpoint in {tmp_path / 'hf'}.\n"
    model = (exported / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == model
    result = command(f"--import_from={tmp_path / 'hf'}", f"--output={tmp_path / 'run'}", f"--config={command.recipe}")
    assert result.returncode == 0, result.stderr
    with Checkpoints(tmp_path / "run", writable=False) as checkpoints:
        assert checkpoints.latest() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --checkpoint=MODEL (export) and --import_from=HF_DIR_OR_HUB_ID (import)"),
        (["--checkpoint=/no/such", "--output=x"], "--checkpoint=/no/such: neither a run folder"),
        (["--import_from=/no/such", "--output=x"], "--import_from=/no/such: no such folder"),
        (["--checkpoint=x", "--output=x", "--dtype=int8"], "flag --dtype=int8"),
    ],
)
def test_the_command_refuses_in_one_line(command, arguments, message):
    result = command(*arguments)
    assert result.returncode == 2
    assert message in the_error(result)
