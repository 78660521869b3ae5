"""Files that are replaced whole, names that any file system takes, and sealed JSON."""

import os
import re

import pytest

from dataflex_jax import files
from dataflex_jax.errors import InputError
from dataflex_jax.files import (
    digest,
    file_name,
    keyed_path,
    read_sealed,
    replace_file,
    replace_json,
    replace_sealed,
    unwritable,
)
from dataflex_jax.foreign import read_object


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(tmp_path / "a.json", b"x")
    assert caught.value.filename == str(tmp_path / "a.json")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    replace_json(path, {"ü": 1}, ensure_ascii=False)
    assert path.read_text(encoding="utf-8") == '{"ü": 1}\n'
    seen = []

    def fails(partial, target):
        seen.append((partial.name, target))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"other")
    # Of this process alone, and gone.
    assert seen == [(f"a.json.{os.getpid()}.partial", path)]
    assert read_object(path) == {"ü": 1}
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json: cannot be read \(No such file or directory\)"),
        ("{", r"a\.json: not valid JSON"),
        ("\n\n{\n", r"a\.json: not valid JSON"),
        ("[]", r"a\.json: a JSON list; one object is expected"),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_object(path)
    assert "\n" not in str(caught.value)


def test_a_digest_stands_for_the_value():
    assert (
        digest({"a": 1, "b": [None, "ü"]}) == digest({"b": [None, "ü"], "a": 1}) == "a57b4ace70eba21d44f538ad62ce9edd"
    )
    assert digest({"a": 1}) != digest({"a": 2})


NAMES = [
    *("..", ".", "../../x", "/", "a/b", "a\\b", "nul\0byte", "a b", "a_b", "a  b", "", "~", "x.", ".x", "a:b", "a\nb"),
    *(
        "你好" * 100,
        "你好" * 99,
        "x" * 80,
        "x" * 81,
        "x" * 200,
        "con",
        "NUL.txt",
        "COM1",
        "e\u0301",
        "é",
        "\udcff",
        "*?",
    ),
]


def test_file_names_are_valid_and_tell_names_apart(tmp_path):
    made = {name: file_name(name) for name in NAMES}
    assert len({name.casefold() for name in made.values()}) == len(NAMES)
    for name in made.values():
        assert len(name.encode()) <= 100
        assert re.fullmatch(r"[\w.~-]+", name)
        assert not name.startswith(".")
        assert not name.endswith(".")
        (tmp_path / name).write_text("")
    assert {path.name for path in tmp_path.iterdir()} == set(made.values())


@pytest.mark.parametrize("name", ["wiki", "Pile-CC", "c4_en.v2", "日本語", "x" * 80, "console", "nullable"])
def test_an_ordinary_name_is_its_file_name(name):
    assert file_name(name) == name


def test_what_has_the_key_is_found_under_any_name(tmp_path):
    assert keyed_path(tmp_path / "none", "a b", "12ab") == tmp_path / "none" / f"{file_name('a b')}-12ab"
    (tmp_path / "a_b-12ab.partial").mkdir()
    (tmp_path / "a_b-34cd").mkdir()
    assert keyed_path(tmp_path, "a b", "12ab") == tmp_path / "a_b-12ab"
    (tmp_path / "other-12ab").mkdir()
    assert keyed_path(tmp_path, "a b", "12ab") == tmp_path / "other-12ab"
    (tmp_path / f"{file_name('a b')}-12ab").mkdir()
    assert keyed_path(tmp_path, "a b", "12ab") == tmp_path / f"{file_name('a b')}-12ab"
    assert keyed_path(tmp_path, "a b", "2ab").name == f"{file_name('a b')}-2ab"


def test_a_sealed_file_that_was_altered_is_refused(tmp_path):
    path, value = tmp_path / "a.json", {"b": [1, None, "é"], "a": {"x": 0.1}}
    replace_sealed(path, value, indent=2, ensure_ascii=False)
    assert read_sealed(path) == value
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0.1", b"0.2"))
    with pytest.raises(InputError, match=r"a\.json: altered after it was written"):
        read_sealed(path)
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"a\.json: not valid JSON"):
        read_sealed(path)
    replace_json(path, [1, value])
    assert read_sealed(path) == [1, value]


def test_whether_a_file_can_be_written_is_known_without_writing_it(tmp_path):
    assert unwritable(tmp_path / "new" / "folder" / "a.json") is None
    assert unwritable(tmp_path / "a.json") is None
    assert list(tmp_path.iterdir()) == []
    assert unwritable(tmp_path) == "it is a folder"
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "file") is None
    assert unwritable(tmp_path / "file" / "a.json") == f"{tmp_path}/file is not a folder"
    assert unwritable("/proc/a.json").startswith("/proc: ")
