"""Builds of stores that end early, or run side by side, and what the next start makes of them."""

import json
import signal
import subprocess
import sys
import time

import pytest

from dataflex_jax.data.stores import build
from dataflex_jax.data.stores.writer import DomainWriter
from dataflex_jax.errors import TrainingError
from tests.data.stores.test_documents import RECORDS, TEXTS, config, open_quietly, snapshot, write_jsonl


@pytest.fixture
def root(tmp_path):
    for name, texts in TEXTS.items():
        write_jsonl(tmp_path / "root" / f"{name}.jsonl", texts)
    return tmp_path / "root"


def test_full_disk_says_what_is_safe_and_the_rerun_goes_on(tmp_path, root, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dataflex_jax.data.stores.flat_files.os.fsync", full)
        with pytest.raises(TrainingError, match="no space left while building the rows store"):
            open_quietly(config(tmp_path))
    assert len(open_quietly(config(tmp_path))[0]) == 2


def test_stopped_after_every_commit_the_result_is_the_same(tmp_path, monkeypatch):
    """Each start is cut off at its second commit, with several domains and a held-out part in one stream."""
    write_jsonl(tmp_path / "root" / "1.jsonl", RECORDS)
    write_jsonl(
        tmp_path / "root" / "2.jsonl", [*RECORDS[::-1], {"text": "new", "meta": {"set": "Z"}}, {"text": "lost"}]
    )
    write_jsonl(tmp_path / "root" / "1.valid.jsonl", RECORDS[10:20])
    fields = {"domain_field": "meta.set", "on_bad_record": "skip"}
    open_quietly(config(tmp_path, **fields))
    monkeypatch.setattr(build, "_BATCH_RECORDS", 7)
    monkeypatch.setattr(build, "COMMIT_SECONDS", 0.0)
    commit, commits = DomainWriter.commit, []

    def cut_off(writer, *arguments):
        commits.append(writer.name)
        if len(commits) == 5:  # in the middle of the second round over the three domains
            raise KeyboardInterrupt
        commit(writer, *arguments)

    monkeypatch.setattr(DomainWriter, "commit", cut_off)
    starts = 0
    while True:
        starts += 1
        commits.clear()
        try:
            open_quietly(config(tmp_path, cache_dir=str(tmp_path / "again"), **fields))
            break
        except KeyboardInterrupt:
            continue
    assert starts > 10
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "cache")


BUILD = """
import json, sys
from ml_collections import ConfigDict
from dataflex_jax.data.stores import build
from dataflex_jax.data.stores.documents import open_document_stores
build.COMMIT_SECONDS = 0.0
build._BATCH_RECORDS = 20
open_document_stores(ConfigDict(json.loads(sys.argv[1])), progress=False)
"""


def test_killed_build_goes_on_to_the_same_bytes(tmp_path):
    write_jsonl(tmp_path / "root" / "a.jsonl", [f"{i} " * 20 for i in range(4000)])
    write_jsonl(tmp_path / "root" / "a.valid.jsonl", [f"{i} " * 20 for i in range(0, 4000, 100)])
    open_quietly(config(tmp_path))
    data = config(tmp_path, cache_dir=str(tmp_path / "killed"))
    command = [sys.executable, "-c", BUILD, json.dumps(data.to_dict())]
    killed, last_size = 0, -1
    for _ in range(3):
        process = subprocess.Popen(command)
        while process.poll() is None:
            sizes = [path.stat().st_size for path in (tmp_path / "killed").glob("stores/*.partial/store/train.tokens")]
            if sizes and sizes[0] > max(last_size, 0):
                process.send_signal(signal.SIGKILL)
                last_size = sizes[0]
                killed += 1
                break
            time.sleep(0.001)
        process.wait()
    assert killed >= 1
    subprocess.run(command, check=True)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "cache")


def test_processes_that_start_at_once_share_one_build(tmp_path, root):
    data = config(tmp_path)
    command = [sys.executable, "-c", BUILD, json.dumps(data.to_dict())]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    shared = snapshot(tmp_path / "cache")
    open_quietly(config(tmp_path, cache_dir=str(tmp_path / "alone")))
    assert shared == snapshot(tmp_path / "alone")
