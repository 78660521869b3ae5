"""`python -m dataflex_jax.export`: both ways, and what it refuses."""

import pytest

from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import Trainer, in_forks, the_error


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


REFUSED = {
    (): "give one of --checkpoint=MODEL (export) and --import_from=HF_DIR_OR_HUB_ID (import)",
    ("--checkpoint=/no/such", "--output=x"): "--checkpoint=/no/such: neither a run folder",
    ("--import_from=/no/such", "--output=x"): "--import_from=/no/such: no such folder",
    ("--checkpoint=x", "--output=x", "--dtype=int8"): "flag --dtype=int8",
}


def test_the_command_works_both_ways_or_refuses_in_one_line(trained, exported, tmp_path):
    trainer, hf = Trainer(tmp_path), tmp_path / "hf"
    calls = (
        (f"--checkpoint={trained}", f"--output={hf}"),
        (f"--import_from={hf}", f"--output={tmp_path / 'run'}", f"--config={trainer.recipe}"),
        *REFUSED,
    )
    folder = tmp_path / "forks"
    folder.mkdir()
    there, back, *refused = in_forks(trainer, folder, [("dataflex_jax.export", *arguments) for arguments in calls])
    assert there.returncode == 0, there.stderr
    assert there.stdout == f"Step 4 of {trained} is now a Hugging Face checkpoint in {hf}.\n"
    assert (hf / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert back.returncode == 0, back.stderr
    with Checkpoints(tmp_path / "run", writable=False) as checkpoints:
        assert checkpoints.latest() == 0
    for result, message in zip(refused, REFUSED.values(), strict=True):
        assert result.returncode == 2
        assert message in the_error(result)
