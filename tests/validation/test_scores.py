"""Files of scores: what is read, and what is refused in one line."""

import re

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.validation.scores import Candidates, read_scores

CANDIDATES = Candidates(4, ("algebra", "law"))
ONE = np.array([0.5, -1.0, 2.0, 0.25])
TWO = np.stack([ONE, ONE[::-1]], axis=1)


def test_one_number_a_candidate_counts_for_all_groups(tmp_path):
    expected = np.stack([ONE, ONE], axis=1)
    np.save(tmp_path / "a.npy", ONE.astype(np.float32))
    np.save(tmp_path / "b.npy", ONE[:, None])
    np.savez(tmp_path / "a.npz", ids=np.arange(2), all_scores=ONE)
    (tmp_path / "a.csv").write_text("\n".join(map(str, ONE)))
    (tmp_path / "b.csv").write_text("value\n" + "\n".join(map(str, ONE)))
    (tmp_path / "c.csv").write_text("id,value\n" + "\n".join(f"{i},{ONE[i]}" for i in (2, 0, 3, 1)) + "\n\n")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read_scores(path, CANDIDATES), expected, err_msg=path.name)


def test_one_number_for_each_group(tmp_path):
    np.save(tmp_path / "a.npy", TWO)
    np.savez(tmp_path / "a.npz", all_scores=ONE, group_scores=TWO)
    np.savez(tmp_path / "b.npz", all_scores=ONE, group_scores=TWO[:, ::-1], groups=np.array(["law", "algebra"]))
    (tmp_path / "a.csv").write_text("law, algebra\n" + "\n".join(f"{b},{a}" for a, b in TWO))
    (tmp_path / "b.csv").write_text(
        "﻿id,algebra,law\n" + "\n".join(f"{i},{TWO[i, 0]},{TWO[i, 1]}" for i in (3, 1, 2, 0))
    )
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read_scores(path, CANDIDATES), TWO, err_msg=path.name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.txt", "1", "--scores=*: accepted: an .npz of `select`, an .npy [N] or [N, groups], or a .csv"),
        ("a.npy", None, "*: cannot be read (No such file or directory); an .npy file of scores is expected"),
        ("a.npy", "no array", "*: not an .npy file of scores ("),
        ("a.npy", ONE[:3], "* is float64 [3]; the pool has 4 candidates and 2 target groups: [4] or [4, 2] numbers"),
        ("a.npy", np.ones((4, 3)), "* is float64 [4, 3]; the pool has 4 candidates"),
        ("a.npy", np.array(["a", "b", "c", "d"]), "* is <U1 [4]; the pool has 4 candidates"),
        ("a.npy", np.array([1, None, 2, 3]), "*: not an .npy file of scores (Object arrays cannot be loaded"),
        ("a.npy", np.array([1, np.nan, np.inf, 3]), "*: 2 of 4 candidates have scores that are not finite; give them"),
        ("a.npy", np.ones(4), "*: all scores for group 'algebra' are equal; there is nothing to foretell by them"),
        (
            "a.npz",
            {"ids": ONE, "scores": ONE},
            "*: has ids, scores, and no all_scores; `select` writes them, and a run",
        ),
        ("a.npz", {"all_scores": ONE[:2]}, "*: all_scores is float64 [2]; the pool has 4 candidates"),
        (
            "a.npz",
            {"group_scores": TWO, "groups": np.array(["a", "law"])},
            "*: scores for the groups a, law; the target groups are algebra, law",
        ),
        ("a.npz", "no archive", "*: not an .npz file of scores ("),
        ("a.csv", "", "*: nothing in it; one line a candidate is expected"),
        ("a.csv", "1\n2\n3", "*: 3 lines of scores; the pool has 4 candidates"),
        ("a.csv", "x\n1\n2\nthree\n4", "*:4: 'three' is not a number"),
        ("a.csv", "algebra,law\n1,2\n3\n4,5\n6,7", "*:3: 1 columns; the header has 2"),
        (
            "a.csv",
            "algebra,physics\n1,2\n3,4\n5,6\n7,8",
            "*: 'physics' is no target group; the groups are algebra, law",
        ),
        ("a.csv", "algebra\n1\n2\n3\n4", "*: 'law' is a target group without a column; the groups are algebra, law"),
        ("a.csv", "law,law\n1,2\n3,4\n5,6\n7,8", "*: two columns are called 'law'"),
        ("a.csv", "id,x\n0,1\n1,2\n1,3\n3,4", "*: the column 'id' must have each of 0 to 3 once"),
        ("a.csv", "x\n1\n2\nnan\n4", "*: 1 of 4 candidates have scores that are not finite"),
        ("a.csv", b"\xff\xfe1\n", "*: not UTF-8 ("),
    ],
)
def test_what_no_study_can_use_is_one_line(tmp_path, name, value, message):
    path = tmp_path / name
    if isinstance(value, np.ndarray):
        np.save(path, value, allow_pickle=True)
    elif isinstance(value, dict):
        np.savez(path, **value)
    elif value is not None:
        path.write_bytes(value if isinstance(value, bytes) else value.encode())
    with pytest.raises(InputError) as raised:
        read_scores(path, CANDIDATES)
    assert str(raised.value).startswith(message.replace("*", str(path))), raised.value
    assert not re.search("\n", str(raised.value))
