"""The command that prompts a checkpoint."""

import subprocess
import sys

import pytest

from dataflex_jax.checkpoint import locate
from dataflex_jax.generate import generate_from_checkpoint
from dataflex_jax.train import train_and_evaluate
from tests import command, tiny

PROMPTS = ["012", "aei"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return command.Trainer(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run_folder(trainer):
    train_and_evaluate(tiny.config(trainer.root, train_step=30), trainer.folder / "run")
    return trainer.folder / "run"


def generate(trainer, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dataflex_jax.generate", *arguments],
        cwd=command.PROJECT,
        env=trainer.environment(1, {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_continues_in_the_language_of_the_prompt(trainer, run_folder):
    options = {"max_new_tokens": 6, "temperature": 0.3, "seeds": [5, 6]}
    continuations = generate_from_checkpoint(*locate(run_folder), PROMPTS, **options)
    for continuation, alphabet in zip(continuations, (tiny.DOMAINS["digits"], tiny.DOMAINS["vowels"]), strict=True):
        assert len(continuation) == 6
        assert set(continuation) <= set(alphabet)
    flags = [f"--prompt={prompt}" for prompt in PROMPTS] + ["--max_new_tokens=6", "--temperature=0.3", "--seed=5"]
    result = generate(trainer, f"--checkpoint={run_folder}", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"{p}{c}\n\n" for p, c in zip(PROMPTS, continuations, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a"], "error: --checkpoint is missing: a run folder, or the folder of one step in it"),
        (["--checkpoint=RUN"], "error: --prompt is missing: the text to continue"),
        (["--checkpoint=RUN", "--prompt=a", "--top_p=2"], "error: top_p=2.0: must be a finite number from 0 to 1"),
    ],
)
def test_bad_options_are_refused(trainer, run_folder, arguments, message):
    result = generate(trainer, *(argument.replace("RUN", str(run_folder)) for argument in arguments))
    assert result.returncode == 2
    assert command.the_error(result).startswith(message)
