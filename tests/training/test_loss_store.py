"""Reference losses on disk: computed once, and never taken from damaged files."""

import concurrent.futures
import json
import logging
import random
import shutil
import time

import filelock
import numpy as np
import pytest

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.files import replace_json
from dataflex_jax.training import loss_store
from dataflex_jax.training.loss_store import LossStore
from tests.helpers import damage

LENGTHS = np.array([5, 3, 8, 1, 8, 8, 2, 6])
LOSSES = np.random.default_rng(0).gamma(2.0, 1.0, (len(LENGTHS), 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(loss_store, "_CHUNK", 3)


def opened(folder, verify="sampled", until=8):
    """(The store, completed; the chunks that were computed for it). Stops before row `until`."""
    store, computed = LossStore(folder, LENGTHS), []

    def compute(first, end):
        if first >= until:
            raise KeyboardInterrupt
        computed.append((first, end))
        return LOSSES[first:end]

    try:
        store.complete(compute, verify)
    except KeyboardInterrupt:
        assert until < len(LENGTHS)
    return store, computed


def rows(store):
    return np.concatenate([store.row(i) for i in range(len(LENGTHS))])


@pytest.fixture
def folder(tmp_path):
    opened(tmp_path / "store")
    return tmp_path / "store"


def test_losses_are_kept_to_their_precision_and_computed_once(folder):
    store, computed = opened(folder)
    assert computed == []
    for i, length in enumerate(LENGTHS):
        np.testing.assert_allclose(store.row(i), LOSSES[i, :length], atol=1e-5 * LOSSES.max())


def test_an_interrupted_store_goes_on_to_the_same_bytes(folder, tmp_path):
    opened(tmp_path / "again", until=6)
    assert opened(tmp_path / "again")[1] == [(6, 8)]
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_losses_that_are_not_finite_are_refused(tmp_path):
    losses = np.array([[1, 2, 3, 4], [1, np.inf, 1, 1]], np.float32)
    with pytest.raises(InputError, match="reference: its losses of row 1 are not finite"):
        LossStore(tmp_path / "store", np.array([4, 4])).complete(lambda first, end: losses[first:end], "sampled")


@pytest.mark.parametrize("name", ["losses.uint16", "scales.float32"])
def test_a_deleted_file_is_no_file_of_zeros(folder, name, caplog):
    before = rows(opened(folder)[0])
    (folder / name).unlink()
    with caplog.at_level(logging.WARNING):
        store, computed = opened(folder)
    assert computed == [(0, 3), (3, 6), (6, 8)]
    (line,) = caplog.messages
    assert line.startswith(f"{folder / name}: missing; ")
    np.testing.assert_array_equal(rows(store), before)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 99}', '{"rows": "8"}', '{"rows": true}', "{}", '"x"'])
def test_a_damaged_or_foreign_progress_is_said_and_computed_again(folder, content, caplog):
    (folder / "progress.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert opened(folder)[1] == [(0, 3), (3, 6), (6, 8)]
    (line,) = caplog.messages
    assert f"{folder / 'progress.json'}: " in line
    assert "computed again" in line


@pytest.mark.parametrize("until", [6, 8])
def test_a_mutated_store_has_the_same_losses(folder, tmp_path, until):
    before, seen = rows(opened(folder)[0]), 0
    opened(tmp_path / "source", until=until)
    for seed in range(40):
        shutil.copytree(tmp_path / "source", tmp_path / "copy")
        damage.mutate(tmp_path / "copy", random.Random(seed))
        store, computed = opened(tmp_path / "copy")
        np.testing.assert_array_equal(rows(store), before)
        seen += len(computed) > (until == 6)
        shutil.rmtree(tmp_path / "copy")
    assert seen > 20


def test_a_store_of_an_older_version_is_used_and_continued(folder, tmp_path):
    before = rows(opened(folder)[0])
    replace_json(folder / "progress.json", {"rows": 8})
    assert opened(folder)[1] == []
    # It was as long as it was to become from the beginning.
    replace_json(folder / "progress.json", {"rows": 3})
    store, computed = opened(folder)
    assert computed == [(3, 6), (6, 8)]
    np.testing.assert_array_equal(rows(store), before)
    assert json.loads((folder / "progress.json").read_text())["checksums"]


def test_a_full_disk_is_one_line_and_what_was_computed_stays(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        damage.fill_disk(patch, after=3)
        with pytest.raises(TrainingError, match="no space left while building the store of reference losses") as e:
            opened(tmp_path / "store")
    assert "\n" not in str(e.value)
    assert opened(tmp_path / "store")[1] == [(3, 6), (6, 8)]


def test_a_read_only_store_is_used_where_it_is_complete(folder, tmp_path, monkeypatch):
    opened(tmp_path / "part", until=6)
    damage.make_read_only(monkeypatch)
    assert opened(folder)[1] == []
    with pytest.raises(InputError, match=r"part is not a writable folder: .* \(reference losses are missing\)"):
        opened(tmp_path / "part")


def test_of_two_runs_one_computes_and_the_other_waits_for_it(tmp_path, caplog):
    opened(tmp_path / "store", until=6)
    other = filelock.FileLock(tmp_path / "store" / ".lock", thread_local=False)
    with other, caplog.at_level(logging.INFO), concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(opened, tmp_path / "store")
        while not any("waiting for another process" in line for line in caplog.messages):
            time.sleep(0.01)
        opened(tmp_path / "elsewhere")
        for path in (tmp_path / "elsewhere").iterdir():
            shutil.copy(path, tmp_path / "store" / path.name)
        other.release()
        assert waiting.result()[1] == []
