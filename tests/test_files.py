"""JSON in and out to the bit, lines that may be torn, and files that are replaced whole."""

import json
import math
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax import files
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.files import (
    JsonlWriter,
    Written,
    digest,
    file_name,
    keyed_path,
    read_jsonl,
    read_sealed,
    replace_file,
    replace_json,
    replace_sealed,
    unwritable,
)
from dataflex_jax.foreign import read_object


def test_floats_read_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    doubles = rng.standard_normal(200) * 10.0 ** rng.integers(-300, 300, 200)
    singles = (rng.standard_normal(200) * 10.0 ** rng.integers(-44, 38, 200)).astype(np.float32)
    halves = jnp.asarray(rng.standard_normal(20), jnp.bfloat16)
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"d": doubles, "s": singles, "h": halves, "d0": doubles[0], "s0": singles[0], "h0": halves[0]})
    (record,) = read_jsonl(tmp_path / "m.jsonl")
    np.testing.assert_array_equal(np.array(record["d"]), doubles)
    np.testing.assert_array_equal(np.array(record["s"], np.float32), singles)
    np.testing.assert_array_equal(np.array(record["s"]), singles.astype(np.float64))
    np.testing.assert_array_equal(np.array(record["h"]), np.asarray(halves, np.float64))
    assert (record["d0"], record["s0"]) == (float(doubles[0]), float(singles[0]))
    assert record["h0"] == float(halves[0])


def test_values_keep_their_kind(tmp_path):
    record = {
        "step": np.int64(3),
        "rows": jnp.array([1, 2], jnp.int32),
        "published": np.bool_(True),
        "name": "café",
        "path": tmp_path,
        "nothing": None,
        "nested": {"a": (1, jnp.float32(0.5))},
    }
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write(record)
    (back,) = read_jsonl(tmp_path / "m.jsonl")
    assert back == {
        "step": 3,
        "rows": [1, 2],
        "published": True,
        "name": "café",
        "path": str(tmp_path),
        "nothing": None,
        "nested": {"a": [1, 0.5]},
    }
    assert back["published"] is True
    assert isinstance(back["step"], int)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.float32("inf")])
def test_not_finite_is_null_only_where_allowed(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1, "mfu": bad, "observed": {"domain_loss": {"a": 1.0, "b": bad}}})
        with pytest.raises(TrainingError, match=r"^metrics\.jsonl at step 2: state\.reward\[1\] is (nan|-?inf); "):
            writer.write({"step": 2, "state": {"reward": [0.0, bad]}})
    assert read_jsonl(path) == [{"step": 1, "mfu": None, "observed": {"domain_loss": {"a": 1.0, "b": None}}}]
    with JsonlWriter(path, nullable=("excess",)) as writer:
        writer.write({"step": 2, "excess": [bad, 1]})
        with pytest.raises(TrainingError, match=r"mfu is "):
            writer.write({"step": 3, "mfu": bad})
    assert read_jsonl(path)[1:] == [{"step": 2, "excess": [None, 1]}]


def test_what_has_no_json_form_is_refused(tmp_path):
    with JsonlWriter(tmp_path / "m.jsonl") as writer, pytest.raises(TypeError, match=r"a\.b is a complex"):
        writer.write({"a": {"b": 1j}})


def test_each_line_is_in_the_file_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "new" / "m.jsonl")
    long = {"step": 1, "text": "x" * 100_000}
    writer.write(long)
    assert read_jsonl(writer.path) == [long]
    writer.write({"step": 2})
    assert [record["step"] for record in read_jsonl(writer.path)] == [1, 2]
    writer.close()


def test_a_torn_last_line_is_left_out_and_not_continued(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    # A torn line longer than what is read at once, and nothing before it.
    path.write_text("x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


def test_truncate_after_keeps_the_bytes_before(tmp_path):
    path = tmp_path / "m.jsonl"
    kept = '{"step": 1,   "loss": 0.10}\n{"step": 2}\n'
    path.write_text(kept + '{"step": 3}\n{"step": 4}\n{"step": 5, "l')
    with JsonlWriter(path) as writer:
        writer.truncate_after(2)
        assert path.read_text() == kept
        writer.write({"step": 3, "again": True})
    assert path.read_text() == kept + '{"step": 3, "again": true}\n'
    assert os.listdir(tmp_path) == ["m.jsonl"]


@pytest.mark.parametrize("step", [0, 1, 499, 500, 999, 1000])
def test_truncate_after_reads_no_more_than_it_drops(tmp_path, monkeypatch, step):
    path, block = tmp_path / "m.jsonl", 300
    monkeypatch.setattr(files, "_BLOCK", block)
    lines = [json.dumps({"step": i, "text": "x" * (900 if i % 100 == 0 else 10)}) + "\n" for i in range(1, 1001)]
    path.write_text("".join(lines))
    parsed = []
    monkeypatch.setattr(files, "parse_json", lambda line: parsed.append(line) or json.loads(line))
    with JsonlWriter(path) as writer:
        assert writer.truncate_after(step) is None
    assert path.read_text() == "".join(lines[:step])
    assert len(parsed) == 1000 - step + (step > 0)


def whole(path) -> tuple[str, Written]:
    """A file of five lines, and how far it had come."""
    with JsonlWriter(path) as writer:
        for step in range(1, 6):
            writer.write({"step": step, "loss": step / 3})
        written = writer.synced()
    return path.read_text(), written


@pytest.mark.parametrize("later", ["", '{"step": 6}\n', '{"step": 6}\n{"st'])
def test_a_file_goes_back_to_where_it_was(tmp_path, later):
    path = tmp_path / "m.jsonl"
    before, written = whole(path)
    path.write_text(before + later)
    with JsonlWriter(path) as writer:
        assert writer.truncate_after(5, written=written) is None
        assert path.read_text() == before
        writer.write({"step": 6})
        after = writer.synced()
    assert (after.size, after.lines) == (written.size + 12, 6)
    with JsonlWriter(path) as writer:
        assert writer.synced() == after


def twice(lines):
    return [*lines[:3], lines[1], lines[2], *lines[3:]]


@pytest.mark.parametrize(
    ("damage", "left", "said"),
    [
        (twice, 5, "none is missing"),
        (lambda lines: [*lines[:2], '{"step": 3, "lo', "\n", *lines[2:]], 5, "none is missing"),
        (lambda lines: [*lines[:2], "\0\xff\n", "[1]\n", *lines[2:]], 5, "none is missing"),
        (lambda lines: lines[:1] + lines[2:], 4, "1 of the 5 lines up to step 5 are missing"),
        (lambda lines: [*lines[:2], lines[2][:7] + lines[3], lines[4]], 3, "2 of the 5 lines"),
        (lambda lines: lines[:3], 3, "2 of the 5 lines"),
        (lambda lines: [], 0, "5 of the 5 lines"),
        (lambda lines: [lines[0].replace("1", "2"), *lines[1:]], 5, "some of the 5 lines .* not what was written"),
    ],
)
def test_lines_that_are_not_as_they_were_are_repaired_as_far_as_possible(tmp_path, damage, left, said):
    path = tmp_path / "m.jsonl"
    before, written = whole(path)
    path.write_text("".join(damage(before.splitlines(keepends=True))))
    with JsonlWriter(path) as writer:
        found = writer.truncate_after(5, written=written)
        writer.write({"step": 6})
    assert re.search(rf"^{path}: .*{said}", found)
    assert len(read_jsonl(path)) == left + 1
    if "none" in said:
        assert path.read_text() == before + '{"step": 6}\n'
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_truncate_after_refuses_a_line_without_step(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(InputError, match=r"m\.jsonl:2: no integer `step`"):
        JsonlWriter(path).truncate_after(1)


@pytest.mark.parametrize(("line", "message"), [("{", "not valid JSON"), ("[1]", "a JSON list"), ("", "not valid JSON")])
def test_read_jsonl_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=rf"m\.jsonl:2: {message}"):
        read_jsonl(path)
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")


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
