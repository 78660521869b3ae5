"""JSON of others: whatever is wrong with it, one line that names the file."""

import json
import os

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.foreign import MAX_DEPTH, next_json, parse_json, read_json, read_object, refuse_pointer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_passed_over(tmp_path, mark):
    (tmp_path / "x.json").write_bytes(mark + b'{"a": [1]}')
    assert read_object(tmp_path / "x.json") == {"a": [1]}


def test_nesting_is_allowed_up_to_the_limit():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH}"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert len(parse_json(b"[" + b"{}," * 1000 + b"{}]")) == 1001


def test_a_value_is_found_in_a_longer_text():
    assert next_json('[1] {"a": [2]} x', 4) == ({"a": [2]}, 14)
    assert next_json("[" * MAX_DEPTH + "]" * MAX_DEPTH + "x")[1] == 2 * MAX_DEPTH
    for text in ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "[" * 100_000):
        with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH}"):
            next_json(text)
    with pytest.raises(json.JSONDecodeError):
        next_json('{"a": ')


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "nested deeper than"),
        (b"1" * 6000, "an integer with thousands of digits"),
        (POINTER, "a Git LFS pointer"),
        (b"[1]", "a JSON list; one object is expected"),
    ],
)
def test_faults_name_the_file(tmp_path, contents, said):
    (tmp_path / "x.json").write_bytes(contents)
    with pytest.raises(InputError, match=f"x.json: .*{said}") as caught:
        read_object(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    for name, said in (("fifo.json", "not a file"), (".", "not a file"), ("none.json", "cannot be read")):
        with pytest.raises(InputError, match=said):
            read_json(tmp_path / name)


def test_a_large_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"1" * 11)
    with pytest.raises(InputError, match="larger than"):
        read_json(tmp_path / "x.json", limit=10)


def test_a_pointer_in_the_place_of_a_large_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"model.safetensors: a Git LFS pointer"):
        refuse_pointer(tmp_path / "model.safetensors")
