"""Caches that are damaged, full, read-only, or of an older version: equal rows or one line, never other rows."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex_jax.data.stores import build, checksums
from dataflex_jax.data.stores.writer import DomainWriter
from dataflex_jax.errors import InputError, TrainingError
from tests.data.stores.test_documents import config, open_quietly, snapshot, write_jsonl
from tests.helpers import damage

RECORDS = [{"text": f"text {i} " * (1 + i % 4), "set": "xyz"[i % 3]} for i in range(90)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)


@pytest.fixture
def root(tmp_path):
    write_jsonl(tmp_path / "root" / "1.jsonl", RECORDS[:50])
    write_jsonl(tmp_path / "root" / "2.jsonl", RECORDS[50:])
    write_jsonl(tmp_path / "root" / "2.valid.jsonl", RECORDS[:9])
    return tmp_path / "root"


def data(tmp_path, cache="cache", **fields):
    fields = {"domain_field": "set", "tokenizer": "train:300", "cache_dir": str(tmp_path / cache)} | fields
    return config(tmp_path, **fields)


def rows(stores):
    return {
        store.name: [np.array(array) for split in (store.train, store.valid) for array in (split.tokens, split.offsets)]
        for store in stores
    }


def opened(*arguments, **fields):
    return rows(open_quietly(data(*arguments, **fields))[0])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        for mine, theirs in zip(found[name], arrays, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def interrupted(tmp_path, monkeypatch, cache):
    """A cache whose build was cut off at its second commit of each domain."""
    commit, commits = DomainWriter.commit, []

    def cut_off(writer, *arguments):
        commits.append(writer.name)
        if len(commits) == 7:
            raise KeyboardInterrupt
        commit(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build, "_BATCH_RECORDS", 20)
        patch.setattr(build, "COMMIT_SECONDS", 0.0)
        patch.setattr(DomainWriter, "commit", cut_off)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path, cache)


@pytest.mark.parametrize(("source", "mutations"), [("cache", 80), ("part", 40), ("part", 15)])
def test_a_mutated_cache_gives_the_same_rows(tmp_path, root, monkeypatch, source, mutations):
    expected = opened(tmp_path)
    interrupted(tmp_path, monkeypatch, "part")
    for seed in range(mutations):
        shutil.copytree(tmp_path / source, tmp_path / "copy")
        how = damage.mutate(tmp_path / "copy", random.Random(seed))
        try:
            assert_same(opened(tmp_path, "copy"), expected)
            again = snapshot(tmp_path / "copy")
            assert_same(opened(tmp_path, "copy"), expected)
            assert snapshot(tmp_path / "copy") == again
        except BaseException as error:
            error.add_note(f"seed {seed}: {how}")
            raise
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("verify", ["sampled", "content", "size"])
def test_flipped_bits_are_found_named_and_built_anew(tmp_path, root, caplog, verify):
    before = opened(tmp_path)
    (file,) = (tmp_path / "cache" / "stores").glob("x-*/train.tokens")
    content = bytearray(file.read_bytes())
    assert len(content) > 6 * 64
    content[-1] ^= 4
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = opened(tmp_path, verify=verify)
    if verify == "size":
        assert found["x"][0][-1] != before["x"][0][-1]
        return
    assert_same(found, before)
    blocks = -(-len(content) // 64)
    assert [line for line in caplog.messages if "damaged" in line] == [
        f"{file}: damaged in block {blocks} of {blocks} of 4 MiB; building the store again"
    ]


def test_a_sample_finds_some_and_the_whole_content_all(tmp_path):
    path, content = tmp_path / "file", random.Random(0).randbytes(64 * 100 + 7)
    path.write_bytes(content)
    kept = {"f": checksums.file_checksums(path, len(content))}
    found = {"sampled": 0, "content": 0, "size": 0}
    for block in range(101):
        path.write_bytes(content[: block * 64] + b"\1" + content[block * 64 + 1 :])
        for verify in found:
            problem = checksums.fault({"f": path}, {"f": len(content)}, kept, verify)
            found[verify] += problem is not None and f"block {block + 1} of 101" in problem
    assert found == {"sampled": 6, "content": 101, "size": 0}


def test_a_sector_that_cannot_be_read_is_damage_too(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"content")

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checksums, "_block", broken)
    problem = checksums.fault({"f": path}, {"f": 7}, {"f": "0" * 8}, "sampled")
    assert problem == f"{path}: cannot be read: Input/output error"


def test_checksums_of_pieces_are_those_of_the_file(tmp_path):
    path, rng, kept = tmp_path / "file", random.Random(1), checksums.BlockChecksums()
    for number in range(40):
        piece = rng.randbytes(rng.choice((0, 1, 63, 64, 65, 300)))
        with path.open("ab") as file:
            file.write(piece)
        kept.update(piece)
        size = path.stat().st_size
        assert str(kept) == checksums.file_checksums(path, size)
        if number % 7 == 0:
            kept = checksums.BlockChecksums(str(kept), size)


def test_an_edit_that_keeps_size_and_time(tmp_path, root):
    before, file = opened(tmp_path), root / "1.jsonl"
    status, content = file.stat(), file.read_bytes()
    file.write_bytes(content.replace(b"text 3 ", b"text X "))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_same(opened(tmp_path), before)
    edited = opened(tmp_path, verify="content")
    assert_same(edited, opened(tmp_path, "fresh"))
    assert any(not np.array_equal(a, b) for name in before for a, b in zip(before[name], edited[name], strict=False))


def without(path, *fields):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in fields}))


def test_a_cache_of_an_older_version_is_used_as_it_is(tmp_path, root, monkeypatch, caplog):
    before = opened(tmp_path)
    for file in (tmp_path / "cache" / "stores").glob("*/meta.json"):
        without(file, "digest", "checksums")
    without(tmp_path / "cache" / "fingerprints.json", "digest")
    (values,) = (tmp_path / "cache" / "domain_values").iterdir()
    values.write_text('["x", "y", "z"]')
    (digest,) = (tmp_path / "cache" / "tokenizers").glob("*/digest")
    digest.unlink()
    damage.make_read_only(monkeypatch)
    for verify in checksums.VERIFY:
        assert_same(opened(tmp_path, verify=verify), before)
    assert [line for line in caplog.messages if "older" in line] == [
        f"{file.parent}: of an older version, without checksums; delete it to have it built with them"
        for file in sorted((tmp_path / "cache" / "stores").glob("*/meta.json"))
    ]


def test_an_interrupted_build_of_an_older_version_goes_on(tmp_path, root, monkeypatch, caplog):
    opened(tmp_path)
    interrupted(tmp_path, monkeypatch, "part")
    for file in (tmp_path / "part").rglob("progress.json"):
        without(file, "digest", "checksums")
    with caplog.at_level(logging.WARNING):
        opened(tmp_path, "part")
    assert not [line for line in caplog.messages if "again" in line]
    assert snapshot(tmp_path / "part") == snapshot(tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "is_said"),
    [("", True), ("{", True), ("[1]", True), ('{"/a": 1, "digest": "0"}', True), ('{"/a": {"b": 1}}', False)],
)
def test_fingerprints_that_are_damaged_are_made_anew(tmp_path, root, content, is_said, caplog):
    before, file = opened(tmp_path), tmp_path / "cache" / "fingerprints.json"
    kept = json.loads(file.read_text())
    file.write_text(content)
    assert_same(opened(tmp_path), before)
    assert [line for line in caplog.messages if "again" in line] == [
        f"{file}: damaged; the files are hashed again"
    ] * is_said
    made = json.loads(file.read_text())
    assert all(made[name] == kept[name] for name in kept if name != "digest")


def test_a_store_of_another_key_is_not_taken_for_this_one(tmp_path, root, caplog):
    before = opened(tmp_path)
    x, y = (next((tmp_path / "cache" / "stores").glob(f"{name}-*")) for name in "xy")
    shutil.rmtree(x)
    shutil.copytree(y, x)
    assert_same(opened(tmp_path), before)
    assert f"{x / 'meta.json'}: of another store; building the store again" in caplog.messages


def test_a_complete_cache_is_read_without_its_lock(tmp_path, root, monkeypatch):
    before = opened(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    damage.make_read_only(monkeypatch)
    assert_same(opened(tmp_path), before)
    # Copied elsewhere the files are new; what they hold is not.
    shutil.copytree(root, tmp_path / "moved")
    assert_same(opened(tmp_path, root=str(tmp_path / "moved")), before)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}


def test_a_read_only_cache_that_lacks_something_is_one_line(tmp_path, root, monkeypatch):
    opened(tmp_path)
    (file,) = (tmp_path / "cache" / "stores").glob("y-*/valid.offsets")
    file.write_bytes(bytes(8))
    damage.make_read_only(monkeypatch)
    for fields, reason in (
        ({}, f"{file}: has 8 bytes, not "),
        ({"tokenizer": "bytes"}, "there is no store of domain 'x' yet"),
        ({"tokenizer": "train:301"}, "the tokenizer is to be trained"),
        ({"cache": "new"}, "it is to be made"),
    ):
        with pytest.raises(InputError) as e:
            opened(tmp_path, **fields)
        assert "\n" not in str(e.value)
        assert reason in str(e.value)


def test_a_full_disk_is_one_line_wherever_it_is_full(tmp_path, root, monkeypatch):
    expected = opened(tmp_path)
    for after in range(0, 24, 3):
        with monkeypatch.context() as patch:
            damage.fill_disk(patch, after=after)
            with pytest.raises(TrainingError, match=r"^[^\n]*no space left while building the rows store[^\n]*$"):
                opened(tmp_path, f"full{after}")
        assert_same(opened(tmp_path, f"full{after}"), expected)


LIMITED = """
import json, resource, signal, sys
from ml_collections import ConfigDict
from dataflex_jax.data.stores.documents import open_document_stores
from dataflex_jax.errors import TrainingError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    open_document_stores(ConfigDict(json.loads(sys.argv[1])), progress=False)
except TrainingError as error:
    print(error)
"""


def limited(data, limit):
    command = [sys.executable, "-c", LIMITED, json.dumps(data.to_dict()), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path, root):
    assert "no space left" in limited(data(tmp_path, tokenizer="bytes"), 500)
    assert len(opened(tmp_path, tokenizer="bytes")) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_small_disk_then_a_larger_one_then_a_read_only_one(tmp_path, root):
    disk, expected = tmp_path / "disk", opened(tmp_path)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        for size in ("16k", "32k", "48k", "64k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
            with pytest.raises(TrainingError, match="no space left"):
                opened(tmp_path, "disk/cache")
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert_same(opened(tmp_path, "disk/cache"), expected)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert_same(opened(tmp_path, "disk/cache"), expected)
        with pytest.raises(InputError, match="is not a writable folder: Read-only file system"):
            opened(tmp_path, "disk/cache", tokenizer="bytes")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["stores", "domain_values", "tokenizers", "fingerprints.json", ".lock"])
def test_what_is_in_the_way_is_one_line(tmp_path, root, name):
    in_the_way = tmp_path / "cache" / name
    if "." in name:
        in_the_way.mkdir(parents=True)
    else:
        in_the_way.parent.mkdir()
        in_the_way.write_text("")
    fault = r"^config.data.cache_dir: [^\n]*/cache[^\n]*: (Is a directory|Not a directory|File exists)"
    with pytest.raises(InputError, match=fault):
        opened(tmp_path)


NAMES = ["..", "../../x", "/etc/x", "a/b", "nul\0byte", "你好" * 100, "a b", "a_b", "A_B", "nul", ".", "é", "x" * 300]


def test_domains_of_any_name_stay_inside_the_cache(tmp_path):
    records = [{"text": f"text {i % 20}", "set": name} for i in range(40) for name in NAMES]
    write_jsonl(tmp_path / "root" / "1.jsonl", records)
    stores, _ = open_quietly(data(tmp_path, tokenizer="bytes", cache_dir=str(tmp_path / "in" / "cache")))
    assert [store.name for store in stores] == sorted(NAMES)
    folder = tmp_path / "in" / "cache" / "stores"
    assert {Path(store.path).parent for store in stores} == {folder}
    assert len(list(folder.iterdir())) == len(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"root", "in"}
    assert os.listdir(tmp_path / "in") == ["cache"]


def test_files_of_one_content_share_a_store_whatever_their_names(tmp_path, caplog):
    for name in ("a b", "a_b", "A_B"):
        write_jsonl(tmp_path / "root" / f"{name}.jsonl", RECORDS)
    plain = {"domain_field": None, "tokenizer": "bytes"}
    before = opened(tmp_path, **plain)
    assert list(before) == ["A_B", "a b", "a_b"]
    (folder,) = (tmp_path / "cache" / "stores").iterdir()
    # As an older version named it.
    folder.rename(folder.with_name(folder.name.replace("A_B", "a_b")))
    assert_same(opened(tmp_path, **plain), before)
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 1


def test_a_domain_whose_name_is_no_text_is_named(tmp_path):
    write_jsonl(tmp_path / "root" / "1.jsonl", [*RECORDS, {"text": "text", "set": "a\udcff"}])
    with pytest.raises(InputError, match=r"domain 'a\\udcff': the name is not UTF-8; give its file or field another"):
        opened(tmp_path)


def test_a_domains_file_may_have_a_long_name(tmp_path):
    write_jsonl(tmp_path / "root" / "a" / ("你" * 66 + " .jsonl"), RECORDS)
    before = opened(tmp_path, domain_field=None)
    assert_same(opened(tmp_path, domain_field=None), before)
    assert list(before) == ["a"]
