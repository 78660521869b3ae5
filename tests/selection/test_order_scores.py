"""Files of scores that an order goes by."""

from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies.base import ScoreSource
from dataflex_jax.selection.order_scores import order_scores


def scores_of(path):
    return order_scores(ScoreSource("file", str(path)), SimpleNamespace(num_rows=3), None)


@pytest.mark.parametrize("text", ["1\n2.5\n-3\n", '\ufeff{"score": 1}\n{"score": 2.5}\n{"score": -3}\n'])
def test_numbers_a_line(tmp_path, text):
    (tmp_path / "scores.jsonl").write_text(text, encoding="utf-8")
    np.testing.assert_array_equal(scores_of(tmp_path / "scores.jsonl"), np.float32([1, 2.5, -3]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1\nNaN\n3\n", ":2: a number, or an object with a number `score`, is expected"),
        (b'1\n{"score": null}\n3\n', ":2: a number, or an object"),
        (b"1\n2\n" + b"1" * 400 + b"\n", ":3: a number, or an object"),
        (b"1\n2\n" + b"1" * 5000 + b"\n", ":3: not valid JSON"),
        (b"1\n" + b"[" * 10000 + b"\n3\n", ":2: not valid JSON (nested deeper"),
        (b"1\n2\n", ": float64 [2]; one number for each of 3 candidates is expected"),
        (b"\xff\xfe1\n", ": not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", ": a Git LFS pointer"),
    ],
)
def test_what_is_no_score_is_named(tmp_path, text, message):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        scores_of(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_nan_in_an_array_is_named(tmp_path):
    np.save(tmp_path / "scores.npy", np.array([1, np.nan, 3]))
    with pytest.raises(InputError, match=r"scores.npy: the score of candidate 1 is NaN; a number is expected$"):
        scores_of(tmp_path / "scores.npy")


def npy(shape, data=bytes(24)):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "contents",
    [npy("(3,)", b""), npy("(10**12,)"), npy(f"({10**12},)"), npy("(" * 9000), b"", b"PK"],
    ids=range(6),
)
def test_an_array_that_is_none_or_claims_too_much_is_one_line(tmp_path, contents):
    (tmp_path / "scores.npy").write_bytes(npy("(3,)"))
    np.testing.assert_array_equal(scores_of(tmp_path / "scores.npy"), np.zeros(3))
    (tmp_path / "scores.npy").write_bytes(contents)
    with pytest.raises(InputError, match=r"scores.npy: not an .npy file of numbers \(.*\)$") as caught:
        scores_of(tmp_path / "scores.npy")
    assert "\n" not in str(caught.value)


def test_an_archive_of_arrays_is_no_array(tmp_path):
    np.savez(tmp_path / "scores.npz", a=np.zeros(3))
    (tmp_path / "scores.npz").rename(tmp_path / "scores.npy")
    with pytest.raises(InputError, match=r"scores.npy: an archive of arrays; one array is expected"):
        scores_of(tmp_path / "scores.npy")
