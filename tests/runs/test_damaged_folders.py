"""Files of a run folder that were damaged: the run goes on to the same numbers, or one line says which file it is."""

import json
import logging
import os
import random
import shutil

import jax
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.run_log import go_back
from dataflex_jax.training import changes, resume
from dataflex_jax.training.checkpoint import Checkpoints, Contents
from dataflex_jax.training.setup import prepared, train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import FILES, assert_same_curves, contents, copy_of

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")
    return tiny.config(root, train_step=8, eval_every=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
    """A finished run with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_and_evaluate(config, folder)
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, config):
    with prepared(config, tmp_path_factory.mktemp("fresh")) as (_, state, _):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def opened(folder, shapes, config):
    """All that a resume reads of a run folder: (step, JSON part, state, lines)."""
    before = changes.last_started_with(folder)
    changes.say(changes.changed(before, config), before, config, 8)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.newest_sound()
        run, state, lines = checkpoints.read_run(step), checkpoints.read_state(step, shapes), checkpoints.lines(step)
    go_back(folder, step, lines)
    records = RunRecords.load(folder)
    values = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    return step, run, values, {"metrics": records.metrics, "policy": records.policy, "eval": records.evals}


def opened_or_refused(folder, shapes, config):
    try:
        return opened(folder, shapes, config)
    except InputError as error:
        return error


@pytest.fixture(scope="module")
def expected(tmp_path_factory, whole, shapes, config):
    """What is read of the sound folder, by step."""
    newest = opened(copy_of(whole, tmp_path_factory.mktemp("newest") / "run"), shapes, config)
    older = copy_of(whole, tmp_path_factory.mktemp("older") / "run")
    shutil.rmtree(older / "checkpoints" / "8")
    return {8: newest, 4: opened(older, shapes, config)}


def mutated(folder, seed: int) -> str:
    """Damages one file of a run folder; returns how."""
    rng = random.Random(seed)
    logs = [folder / name for name in (*FILES, "config.json")]
    files = sorted(path for path in (folder / "checkpoints" / "8").rglob("*") if path.is_file())
    path = rng.choice(logs if seed % 3 == 0 else files)
    data, lines = bytearray(path.read_bytes()), path.read_bytes().splitlines(keepends=True)
    hows = ["cut", "flipped", "gone", "emptied", "grown"]
    if path in logs:
        hows += ["line lost", "line twice", "line cut", "lines swapped", "foreign line"]
    how, place = rng.choice(hows), rng.randrange(len(lines))
    if how == "gone":
        path.unlink()
        return f"{path.name} {how}"
    if how == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "lines swapped":
        other = rng.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    elif how in ("line lost", "line twice", "line cut"):
        line = lines[place]
        lines[place] = {"line lost": b"", "line twice": line + line, "line cut": line[: len(line) // 2]}[how]
    elif how == "foreign line":
        lines.insert(place, rng.choice([b"\n", b"[]\n", b"\0\0\0\n", b'{"loss": 1}\n', b'{"step": "3"}\n']))
    if how in ("cut", "emptied", "grown"):
        size = {"cut": rng.randrange(len(data)), "emptied": 0, "grown": len(data)}[how]
        path.write_bytes(data[:size] + (b"\0\1" if how == "grown" else b""))
    else:
        path.write_bytes(data if how == "flipped" else b"".join(lines))
    return f"{path.name} {how}"


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(i, marks=pytest.mark.slow) for i in range(30, 150))])
def test_a_damaged_file_never_changes_a_number_unsaid(tmp_path, config, whole, shapes, expected, caplog, seed):
    folder = copy_of(whole, tmp_path / "run")
    how = mutated(folder, seed)
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        found = opened_or_refused(folder, shapes, config)
    if isinstance(found, InputError):
        assert str(folder) in str(found), how
        assert "\n" not in str(found), how
        return
    step, run, state, lines = found
    if step == 4:
        assert "checkpoints/8: damaged" in caplog.text, how
    _, expected_run, expected_state, expected_lines = expected[step]
    assert run == expected_run, how
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    for name, found in lines.items():
        if found != expected_lines[name]:
            assert f"{name}.jsonl: " in caplog.text, how
            assert "missing or not what was written" in caplog.text, how


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 40))
def test_a_run_goes_on_from_a_damaged_folder_to_the_same_end(tmp_path, config, whole, caplog, seed):
    folder = copy_of(whole, tmp_path / "run")
    mutated(folder, 1000 + seed)
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        assert train_and_evaluate(config, folder).step == 8
    if "missing or not what was written" not in caplog.text:
        assert_same_curves(folder, whole)


def test_the_older_checkpoint_of_a_damaged_one_ends_in_the_same_run(tmp_path, config, whole, caplog):
    folder = copy_of(whole, tmp_path / "run")
    arrays = folder / "checkpoints" / "8" / "state" / "ocdbt.process_0" / "d"
    largest = max(arrays.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        assert train_and_evaluate(config, folder).step == 8
    assert f"checkpoints/8: damaged (state/ocdbt.process_0/d/{largest.name}: not what was written)" in caplog.text
    assert_same_curves(folder, whole)


def test_a_line_that_was_lost_before_the_checkpoint_is_said_of_a_finished_run_too(tmp_path, config, whole, caplog):
    folder = copy_of(whole, tmp_path / "run")
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    with caplog.at_level(logging.WARNING, "dataflex_jax"):
        assert train_and_evaluate(config, folder).step == 8
    assert f"{path}: 1 of the 8 lines up to step 8 are missing" in caplog.text
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4, 5, 6, 7, 8]


def test_a_mixer_whose_state_has_another_shape_is_named_and_nothing_is_lost(tmp_path, config):
    folder = tmp_path / "run"
    ado = tiny.config(tiny.Path(config.data.root), "ado")
    with prepared(ado, folder) as (job, state, position):
        position = position._replace(sampler=position.sampler._replace(step=2))
        job.checkpoints.save(2, Contents(state, resume.to_json(job.identity, position)))

    def refused(expected: str) -> str:
        with pytest.raises(InputError, match=expected) as raised, prepared(ado, folder):
            pass
        return str(raised.value)

    ado.mixer.history = 512
    message = refused(r"config.mixer.history = 512: mixer/history/\w+ has shape")
    assert message.endswith("; set it back to 256, or use a new --workdir")
    ado.mixer.history = 256
    ado.data.tokenizer = "train:300"
    refused(r"config.data.tokenizer = 'train:300': the run was started with 'bytes'")
    ado.data.tokenizer = "bytes"
    with prepared(ado, folder) as (_, _, position):
        assert position.sampler.step == 2


@pytest.fixture
def read_only(monkeypatch):
    """A root user may write everywhere; only the question whether it may is answered as elsewhere."""
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)


def test_a_finished_run_that_can_only_be_read_is_finished(config, whole, read_only):
    before = contents(whole)
    outcome = train_and_evaluate(config, whole)
    assert (outcome.step, outcome.preempted, outcome.tokens_seen > 0) == (8, False, True)
    assert contents(whole) == before


def test_an_unfinished_run_that_can_only_be_read_is_refused(config, whole, read_only, tmp_path):
    longer = tiny.having(config.copy_and_resolve_references(), {"train_step": 16})
    before = contents(whole)
    with pytest.raises(InputError, match=r"cannot be written, and only 8 of config.train_step = 16 steps are done; go"):
        train_and_evaluate(longer, whole)
    assert contents(whole) == before
    with pytest.raises(InputError, match="a folder that cannot be written; choose another"):
        train_and_evaluate(config, tmp_path)
