"""Killed, stopped, out of room, not finite: caused for real, in the real command."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from dataflex_jax.training.checkpoint import Checkpoints
from tests.helpers import tiny
from tests.helpers.command import (
    Starter,
    Trainer,
    assert_same_curves,
    contents,
    copy_of,
    finish,
    number_of_lines,
    saved_steps,
    the_error,
    wait_until,
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def starter(trainer):
    starter = Starter(trainer)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def whole(trainer, starter):
    """An uninterrupted run."""
    starter.done(workdir=trainer.folder / "whole")
    return trainer.folder / "whole"


@pytest.fixture(scope="module")
def first_part(trainer, starter):
    """A run that ended at step 4; copy it before going on from it."""
    starter.done("--config.train_step=4", workdir=trainer.folder / "first_part")
    return trainer.folder / "first_part"


PUBLISHES_EVERY_STEP = ("--config.warmup_step=0", "--config.update_step=1", "--config.checkpoint_every=2")

# Patterns for Python's audit events; the process dies right before the operation.
WRITING_THE_FIRST_SAVE = r"^open \S*/checkpoints/2\.\S*tmp/state\S*/_METADATA"
COMMITTING = r"^os.rename \S*/checkpoints/%d\.\S*tmp \S*/checkpoints/%d$"
WRITING = r"^open \S*/checkpoints/%d\.\S*tmp/state\S*/array_metadatas/"
DROPPING_LINES = r"^os.truncate$"
DELETING_AN_OLD_ONE = r"^os.rmdir \S*/checkpoints/4$"
WRITING_THE_SUMMARY = r"^os.rename \S*/summary.json.\d+.partial "


@pytest.mark.parametrize(
    ("lag", "moments"),
    [
        (0, (COMMITTING % (6, 6),)),
        pytest.param(
            3,
            (
                r"^os.mkdir \S*/checkpoints$",
                WRITING_THE_FIRST_SAVE,
                COMMITTING % (2, 2),
                COMMITTING % (4, 4),
                DROPPING_LINES,
                DELETING_AN_OLD_ONE,
                WRITING % 8,
                WRITING_THE_SUMMARY,
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_at_any_moment_and_started_again_it_draws_the_same_curves(starter, tmp_path, lag, moments):
    """The peer's resume loses the mixer's state. Here every start but the last is killed, mostly inside a save."""
    options = (*PUBLISHES_EVERY_STEP, f"--config.data.lag={lag}", "--config.keep=1")
    starter.done(*options, "--config.keep=9", workdir=tmp_path / "whole")
    saved = Checkpoints(tmp_path / "whole", writable=False).read_run(6)
    assert [step for step, _ in saved["sampler"]["pending"]] == [7 + i for i in range(lag + 1)]

    run = tmp_path / "run"
    for moment in moments:
        result = starter.run(*options, workdir=run, SIGNAL="SIGKILL", SIGNAL_AT=moment)
        assert result.returncode == -signal.SIGKILL, (moment, result.stderr)
    starter.done(*options, workdir=run)
    assert_same_curves(run, tmp_path / "whole")
    assert saved_steps(run) == [12]


@pytest.mark.slow
def test_killed_between_saves(trainer, tmp_path):
    options = (*PUBLISHES_EVERY_STEP, "--config.data.lag=1", "--config.train_step=50", "--config.checkpoint_every=10")
    trainer.done(*options, workdir=tmp_path / "whole")
    run = tmp_path / "run"
    for lines in (5, 24):
        process = trainer.start(*options, workdir=run)
        wait_until(lambda lines=lines: number_of_lines(run / "metrics.jsonl") >= lines, process)
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL
    trainer.done(*options, workdir=run)
    assert_same_curves(run, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("milliseconds", range(0, 600, 40))
def test_killed_during_a_save_by_the_clock(trainer, tmp_path, whole, milliseconds):
    """So that the moments between Python's file operations are met too: TensorStore writes from threads of its own."""
    process = trainer.start(workdir=tmp_path)
    wait_until(lambda: any((tmp_path / "checkpoints").glob("*tmp*")), process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(milliseconds / 1000)
    process.kill()
    finish(process)
    trainer.done(workdir=tmp_path)
    assert_same_curves(tmp_path, whole)


COMPILING_THE_STEP = r"^open \S*/compilations/jit_(_unnamed_function|train_step)"
COMPILING_THE_EVALUATION = r"^open \S*/compilations/jit_sums"


def test_stopped_on_request_it_saves_and_goes_on(starter, whole, tmp_path):
    for name, moment, step in (
        ("SIGTERM", COMPILING_THE_STEP, 1),
        ("SIGINT", COMPILING_THE_STEP, 2),
        ("SIGTERM", COMPILING_THE_EVALUATION, 5),
    ):
        result = starter.done(workdir=tmp_path, SIGNAL=name, SIGNAL_AT=moment)
        said, hint = result.stdout.splitlines()
        assert said == f"Stopped on request after step {step}, saved; the same command goes on from there."
        assert hint == f"What it was until then: python -m dataflex_jax.report {tmp_path} --output=report.html"
        assert saved_steps(tmp_path)[-1] == step
    starter.done(workdir=tmp_path)
    assert_same_curves(tmp_path, whole)


@pytest.mark.slow
def test_stopped_while_it_tokenises_it_goes_on_with_what_is_there(starter, whole, tmp_path):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    second_store = r"^open \S*/stores/vowels-\S*/train"
    result = starter.done(cache, workdir=tmp_path / "run", SIGNAL="SIGTERM", SIGNAL_AT=second_store)
    assert result.stdout == "Stopped on request before the first step; the same command begins anew.\n"
    assert "Traceback" not in result.stderr
    starter.done(cache, workdir=tmp_path / "run")
    assert_same_curves(tmp_path / "run", whole)


def limited(kilobytes: int) -> tuple[str, ...]:
    """No file can grow beyond this: what a full disk does, without a disk."""
    return ("sh", "-c", f'ulimit -f {2 * kilobytes}; exec "$@"', "limited")


@pytest.mark.slow
def test_no_room_for_a_save_costs_no_earlier_one(trainer, first_part, whole, tmp_path):
    run = copy_of(first_part, tmp_path / "run")
    before = contents(run / "checkpoints" / "4")
    result = trainer.run(workdir=run, prefix=limited(20))
    assert result.returncode == 1
    assert "writing a checkpoint failed (File too large)" in the_error(result)
    assert the_error(result).endswith(f"last good checkpoint: {run / 'checkpoints' / '4'}")
    assert saved_steps(run) == [4]
    assert contents(run / "checkpoints" / "4") == before
    trainer.done(workdir=run)
    assert_same_curves(run, whole)


@pytest.mark.slow
def test_no_room_for_the_metrics_costs_no_checkpoint(trainer, first_part, whole, tmp_path):
    run = copy_of(first_part, tmp_path / "run")
    endless = ("--config.train_step=1000", "--config.checkpoint_every=1000", "--config.eval_every=0")
    result = trainer.run(*endless, workdir=run, prefix=limited(8))
    assert result.returncode == 1
    assert the_error(result) == f"error: {run}: File too large; last good checkpoint: {run / 'checkpoints' / '4'}"
    trainer.done(workdir=run)
    assert_same_curves(run, whole)


@pytest.mark.slow
def test_a_full_disk(trainer, whole, tmp_path):
    """A file system of 700 kB: room for the first checkpoint, not for two more; then it grows."""
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    in_a_namespace = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount = f"mount -t tmpfs -o size=700k none {disk}"
    if subprocess.run([*in_a_namespace, mount], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a user mount a file system")
    script = f"""
        {mount}
        "$@" >/dev/null; echo "exit code $?" >&2
        ls {run}/checkpoints >&2
        mount -o remount,size=50m {disk}
        "$@"
        cp -r {run} {tmp_path}
    """
    result = trainer.done(workdir=run, prefix=(*in_a_namespace, script, "full"))
    assert "exit code 1\n" in result.stderr
    error = the_error(result)
    assert "No space left on device" in error
    assert error.endswith((f"last good checkpoint: {run / 'checkpoints' / '4'}", f"{run / 'checkpoints' / '8'}"))
    assert_same_curves(tmp_path / "run", whole)


def test_a_loss_that_is_not_finite_stops_the_run(starter, first_part, whole, tmp_path):
    run = copy_of(first_part, tmp_path / "run")
    result = starter.run("--config.optim.learning_rate=1e30", workdir=run)
    assert result.returncode == 1
    rows = tiny.records(whole, "policy.jsonl")[5]["observed"]["domain_rows"]
    assert the_error(result) == (
        f"error: loss is nan at step 6; rows in the batch: {', '.join(f'{n} of {name}' for name, n in rows.items())}; "
        f"last good checkpoint: {run / 'checkpoints' / '4'}"
    )
    assert saved_steps(run) == [4]
    starter.done(workdir=run)
    assert_same_curves(run, whole)


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved(starter, tmp_path):
    """The step that breaks them has a finite loss itself."""
    absurd = ("--config.optim.learning_rate=3e38", "--config.optim.weight_decay=1e3", "--config.checkpoint_every=1")
    result = starter.run(*absurd, workdir=tmp_path)
    assert result.returncode == 1
    error = the_error(result)
    assert error.startswith("error: a parameter or optimizer moment is not finite at step 1; rows in the batch: ")
    assert error.endswith("; no checkpoint is complete yet")
    assert saved_steps(tmp_path) == []


@pytest.mark.slow
def test_a_mixer_that_breaks_down_stops_the_run(trainer, starter, tmp_path):
    recipe = tmp_path / "broken.py"
    recipe.write_text(f"""
import jax.numpy as jnp
from dataflex_jax.policies import base, registry
from tests.helpers import tiny

def update(state, observation):
    return jnp.where(observation.step == 3, state / 0, state)

@registry.register_mixer("broken")
def broken():
    return base.Mixer(init=lambda proportions: proportions, update=update, sampling_weights=lambda state: state)

def get_config():
    return tiny.config(tiny.Path({str(trainer.root)!r}), "broken", checkpoint_every=2)
""")
    result = starter.run(config=recipe, workdir=tmp_path / "run")
    assert result.returncode == 1
    error = the_error(result)
    assert error.startswith("error: mixer broken: not all finite, mixer = {'code': inf, ")
    assert " at step 3; rows in the batch: " in error
    assert error.endswith(f"; last good checkpoint: {tmp_path / 'run' / 'checkpoints' / '2'}")
    assert saved_steps(tmp_path / "run") == [2]


@pytest.mark.slow
def test_what_is_left_of_a_killed_process_in_the_cache_of_compilations_does_no_harm(trainer, whole, tmp_path):
    compilations = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    torn = tmp_path / "compilations"
    torn.mkdir()
    for entry in compilations.glob("*-cache"):
        (torn / entry.name).write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    trainer.done(workdir=tmp_path / "run", JAX_COMPILATION_CACHE_DIR=str(torn))
    assert_same_curves(tmp_path / "run", whole)


@pytest.mark.slow
def test_without_held_out_text_it_trains_all_the_same(starter, tmp_path):
    starter.done("--config.data.valid_fraction=0.0", "--config.train_step=2", workdir=tmp_path)
    (evaluation,) = tiny.records(tmp_path, "eval.jsonl")
    assert evaluation == {"step": 2, "split": "valid", "domains": {}, "overall": None}
    assert saved_steps(tmp_path) == [2]
