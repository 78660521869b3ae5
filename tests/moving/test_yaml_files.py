"""YAML of others: what is read, and one line with file and line for what is not."""

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.moving.yaml_files import read_yaml


def written(folder, text):
    path = folder / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_values_and_the_lines_of_their_keys(tmp_path):
    text = "# a file\na: 1e-4\nb: [1, 2.5, x]\n\nc:\n  d: true # yes\n  e: null\nf: 'on'\ng: 1.0e-4\nh: -2E3\n"
    found = read_yaml(written(tmp_path, text))
    assert found == {
        "a": 1e-4,
        "b": [1, 2.5, "x"],
        "c": {"d": True, "e": None},
        "f": "on",
        "g": 1e-4,
        "h": -2000.0,
    }
    assert (found.lines["c"], found["c"].lines["e"]) == (5, 7)
    assert str(found["c"].place("e")) == f"{tmp_path / 'a.yaml'}:7: e"
    assert str(found.place("nothing")) == f"{tmp_path / 'a.yaml'}: nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: a a second time; the first is in line 1"),
        ("a:\n  b: 1\n  b: 2\n", ":3: b a second time; the first is in line 2"),
        ("a: &x 1\nb: 2\n", ":1: &x: anchors and aliases are not read; write the value out"),
        ("a: 1\nb: *x\n", r":2: \*x: anchors and aliases are not read; write the value out"),
        ("a: 1\n<<: {b: 2}\n", ":2: could not determine a constructor"),
        ("a: !!python/object:os.system x\n", ":1: could not determine a constructor"),
        ("1: a\n", ":1: a key that is no text"),
        ("[a]: b\n", ":1: a key that is no text"),
        ("a: [1\nb: 2\n", ":2: did not find expected|:2: expected ',' or"),
        ("a: b: c\n", ":1: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", ":2: but found another document"),
        ("- a\n", ": no mapping of names to values"),
        ("", ": no mapping of names to values"),
        ("a: 2024-13-45\n", r": not valid YAML \(month must be in 1..12\)"),
        (b"a: \xff\n", r": not UTF-8 \(byte 3\)"),
        ("a: \x07\n", ": not valid YAML"),
        ("[" * 5000, ": nested too deep"),
    ],
)
def test_what_is_not_read_is_one_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)
    assert error.match(rf"^{path}({message})")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read .*; a YAML file is expected"):
        read_yaml(tmp_path / "none.yaml")
