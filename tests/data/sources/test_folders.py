"""What of a folder is read, as which split; what is not is named, never passed over."""

import bz2
import gzip
import json
import lzma
import os
import socket

import pytest
import zstandard

from dataflex_jax.data.sources import local
from dataflex_jax.data.sources.folders import find
from dataflex_jax.data.sources.names import FORMATS, listed, split_format, split_of
from dataflex_jax.data.sources.table import open_source
from dataflex_jax.errors import InputError
from tests.data.sources.test_streams import config, texts, write_jsonl

PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(local.logger, "warning", lambda message, *values: said.append(message % values))
    return said


def opened(root, **fields):
    return {next(iter(s.domains.values())): s for s in open_source(config(root=str(root), **fields))}


def trained(root, **fields):
    return {name: texts(stream, stream.train) for name, stream in opened(root, **fields).items()}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSON", ".Jsonl"])
def test_every_usual_spelling_is_read(tmp_path, suffix, packing):
    lines, array = b'{"text": "a"}\n{"text": "b"}\n', b'[{"text": "a"},\n {"text": "b"}]'
    (tmp_path / f"x{suffix}{packing.upper()}").write_bytes(PACKED[packing](lines))
    expected = {"x": ["a", "b"]}
    if suffix.lower() == ".json":
        (tmp_path / f"y{suffix}{packing}").write_bytes(PACKED[packing](array))
        expected["y"] = ["a", "b"]
    assert trained(tmp_path) == expected


def test_what_is_not_read_is_named_in_one_line_a_domain(tmp_path, warnings):
    write_jsonl(tmp_path / "a" / "1.jsonl", "a1")
    for name in (
        "a/2.csv",
        "a/3.arrow",
        "a/part-0",
        "a/README.md",
        "a/.hidden.csv",
        "a/deep/4.tsv",
        "b.bin",
        "LICENSE",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.csv").write_text("x")
    assert trained(tmp_path) == {"a": ["a1"]}
    assert warnings == [
        "domain a: not read, of no known format: 2.csv, 3.arrow, part-0; nothing to train on in: deep/",
        f"{tmp_path}: not read, of no known format: b.bin; nothing to train on in: empty/, only/",
    ]
    warnings.clear()
    assert trained(tmp_path, domains=("a",)) == {"a": ["a1"]}
    assert len(warnings) == 1
    with pytest.raises(InputError, match=r"'only' is not in .*: b.bin; nothing .* in: empty/, only/\); available: a"):
        trained(tmp_path, domains=("only",))


def test_a_folder_without_anything_to_read_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "y").mkdir()
    for field in (None, "meta"):
        with pytest.raises(
            InputError,
            match=r"no data files; .*\.jsonl\[\.gz\|.*; not read, of no known format: x.csv; nothing .* in: y/",
        ) as caught:
            open_source(config(root=str(tmp_path), domain_field=field))
        assert "\n" not in str(caught.value)


def test_links_to_folders_are_followed_and_loops_refused(tmp_path):
    root = tmp_path / "root"
    write_jsonl(root / "a" / "1.jsonl", "a1")
    write_jsonl(tmp_path / "elsewhere" / "sub" / "2.jsonl", "a2")
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    assert trained(root) == {"a": ["a1", "a2"]}
    for loop in (root / "a" / "loop", tmp_path / "elsewhere" / "sub" / "loop", root / "loop"):
        loop.symlink_to(loop.parent)
        for field in (None, "meta"):
            with pytest.raises(InputError, match=r"loop: a link to a folder that it lies in"):
                open_source(config(root=str(root), domain_field=field))
        loop.unlink()


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a" / "1.jsonl", "a1")
    os.mkfifo(tmp_path / "a" / "2.jsonl")
    for field in (None, "meta"):
        with pytest.raises(InputError, match=r"2.jsonl: a pipe or device, not a file"):
            open_source(config(root=str(tmp_path), domain_field=field))
    with pytest.raises(InputError, match=r"2.jsonl: a pipe or device, not a file"):
        open_source(config(root=str(tmp_path / "a" / "2.jsonl"), domain_field="meta"))
    os.unlink(tmp_path / "a" / "2.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        server.bind("b.jsonl")
        with pytest.raises(InputError, match=r"b.jsonl: a pipe or device, not a file"):
            open_source(config(root=str(tmp_path)))


def test_a_folder_named_like_a_file_is_a_folder(tmp_path, warnings):
    write_jsonl(tmp_path / "a" / "1.parquet" / "part.jsonl", "a1")
    (tmp_path / "a" / "2.jsonl").mkdir()
    assert trained(tmp_path) == {"a": ["a1"]}
    assert warnings == ["domain a: nothing to train on in: 2.jsonl/"]


def test_a_file_may_have_any_name_and_a_message_about_it_is_one_line(tmp_path, warnings):
    folder = os.fsencode(tmp_path) + b"/a/"
    os.mkdir(folder)
    for name, content in ((b"\xff\n.jsonl", b'{"text": "x"}\n{\n'), (b"\xff\n.csv", b"")):
        with open(folder + name, "wb") as file:
            file.write(content)
    (stream,) = open_source(config(root=str(tmp_path)))
    good, bad = stream.documents(stream.train[0])
    assert (good.text, good.problem) == ("x", None)
    assert bad.problem.startswith(f"{tmp_path}/a/\\udcff\\n.jsonl:2: not valid JSON")
    assert warnings == [r"domain a: not read, of no known format: \udcff\n.csv"]


@pytest.mark.parametrize("held_out", ["validation", "valid", "val", "dev", "eval"])
@pytest.mark.parametrize("below", ["", "a"])
def test_folders_called_like_splits_are_splits(tmp_path, warnings, held_out, below):
    folder = tmp_path / "corpus" / below
    write_jsonl(folder / "train" / "x.jsonl", "t")
    write_jsonl(folder / held_out / "y.jsonl", "v")
    write_jsonl(folder / "test" / "z.jsonl", "never")
    (stream,) = opened(tmp_path / "corpus").values()
    assert stream.domains == {None: below or "corpus"}
    assert (texts(stream, stream.train), texts(stream, stream.valid)) == (["t"], ["v"])
    assert warnings == [f"domain {below or 'corpus'}: not trained on: 1 file of the test split"]
    (stream,) = open_source(config(root=str(tmp_path / "corpus"), domain_field="meta"))
    assert [part.path.name for part in (*stream.train, *stream.valid)] == ["x.jsonl", "y.jsonl"]


@pytest.mark.parametrize("below", ["", "a"])
def test_files_called_like_splits_are_splits_beside_one_called_train(tmp_path, below):
    folder = tmp_path / "corpus" / below
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "dev"):
        write_jsonl(folder / f"{name}.jsonl", name[:5])
    (stream,) = opened(tmp_path / "corpus").values()
    assert (texts(stream, stream.train), texts(stream, stream.valid)) == (["train", "train"], ["dev"])


def test_numbered_files_of_a_split_are_no_domains(tmp_path, warnings):
    for name in ("train_0", "train_1", "test_0", "eval.1"):
        write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", name)
    (stream,) = opened(tmp_path / "corpus").values()
    assert (texts(stream, stream.train), texts(stream, stream.valid)) == (["train_0", "train_1"], ["eval.1"])
    assert warnings == ["domain corpus: not trained on: 1 file of the test split"]


def test_domains_may_be_called_like_splits(tmp_path):
    for name in ("train", "test", "books"):
        write_jsonl(tmp_path / f"{name}.jsonl", name)
    assert list(trained(tmp_path)) == ["books", "test", "train"]
    (tmp_path / "books.jsonl").unlink()
    assert list(trained(tmp_path)) == [tmp_path.name]
    assert list(trained(tmp_path, domains=("test", "train"))) == ["test", "train"]
    (tmp_path / "train.jsonl").unlink()
    assert list(trained(tmp_path)) == ["test"]
    write_jsonl(tmp_path / "dev" / "x.jsonl", "dev")
    with pytest.raises(InputError, match=r"has splits, but no train; give the one to train on as data.root"):
        trained(tmp_path)


def test_names():
    assert split_format("a.JSON.GZ") == ("a", ".json.gz")
    assert split_format("dataset_info.json") is split_format("_a.jsonl") is split_format(".json") is None
    assert [split_of(name) for name in ("Train", "val", "dev-0-of-9", "devops", "a")] == [
        "train",
        *["valid"] * 2,
        None,
        None,
    ]
    assert listed((".json", ".json.gz", ".parquet")) == ".json[.gz], .parquet"


def test_three_thousand_files_take_no_time(tmp_path):
    for i in range(3_000):
        (tmp_path / f"{i}.jsonl").touch()
    assert len(find(tmp_path, FORMATS).train) == 3_000


def test_a_domain_field_that_is_missing_says_what_the_first_record_has(tmp_path):
    lines = [
        {"text": "x", "meta": "no json"},
        {"text": "x", "meta": '{"set": '},
        {"text": "x", "meta": None},
        {"text": "x", "meta": {"set": None}},
        {"text": "x", "meta": {"set": True}},
        {"text": "x", "meta": '{"set": "X"}'},
        {"text": "x", "meta": {"set": 7}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stream,) = open_source(config(root=str(path), domain_field="meta.set"))
    documents = list(stream.documents(stream.train[0]))
    field = "field 'meta.set' (option domain_field)"
    assert [document.problem for document in documents[:5]] == [
        f"{path}:1: no {field}: field 'meta' is str, not an object (or its JSON)",
        f"{path}:2: field 'meta' is a string and no JSON: Expecting value: line 1 column 9 (char 8)",
        f"{path}:3: no {field}: field 'meta' is null, not an object (or its JSON)",
        f"{path}:4: {field} must be a string or an integer but is null",
        f"{path}:5: {field} must be a string or an integer but is bool",
    ]
    assert [document.value for document in documents[5:]] == ["X", "7"]
