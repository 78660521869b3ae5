"""Files of lines: JSON in and out to the bit, and lines that may be torn, lost or doubled."""

import json
import math
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax import json_lines
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.json_lines import JsonlWriter, Written, read_jsonl


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
    monkeypatch.setattr(json_lines, "_BLOCK", block)
    lines = [json.dumps({"step": i, "text": "x" * (900 if i % 100 == 0 else 10)}) + "\n" for i in range(1, 1001)]
    path.write_text("".join(lines))
    parsed = []
    monkeypatch.setattr(json_lines, "parse_json", lambda line: parsed.append(line) or json.loads(line))
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
