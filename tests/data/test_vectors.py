"""Vectors in files: the same rows from every form, whichever part is read."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dataflex_jax.data.vectors import open_vectors
from dataflex_jax.errors import InputError

ROWS = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
WHOLE = np.arange(200).reshape(50, 4) + 1


def written(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=20)
    return path


def in_lists(kind, rows):
    return {"vector": pyarrow.array(rows.tolist(), kind)}


FORMS = {
    "lists": lambda rows: in_lists(pyarrow.list_(pyarrow.float32()), rows),
    "large lists": lambda rows: in_lists(pyarrow.large_list(pyarrow.float64()), rows),
    "fixed lists": lambda rows: in_lists(pyarrow.list_(pyarrow.float32(), 4), rows),
    "columns": lambda rows: {f"x{i}": column for i, column in enumerate(rows.T)},
    "one column": lambda rows: {"x": rows[:, 0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_parquet_in_every_form_and_part(tmp_path, form):
    found = open_vectors(written(tmp_path / "a.parquet", FORMS[form](ROWS)))
    expected = ROWS[:, :1] if form == "one column" else ROWS
    assert (found.num_rows, found.width) == expected.shape
    for part in ((0, 50), (0, 20), (15, 45), (20, 21), (49, 50)):
        np.testing.assert_array_equal(found.read(*part), expected[slice(*part)])


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint64", ">f4"])
def test_npy_of_every_kind_of_number(tmp_path, dtype):
    rows = WHOLE.astype(dtype)
    rows[rows == 0] = 1
    np.save(tmp_path / "a.npy", rows)
    found = open_vectors(tmp_path / "a.npy")
    found.check()
    wanted = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    units = found.units(3, 30)
    assert units.dtype == np.float32
    np.testing.assert_allclose(units, wanted[3:30], rtol=1e-6)


def test_numbers_of_any_size_have_a_direction(tmp_path):
    rows = ROWS.astype(np.float64)
    rows[0], rows[1] = 1e-30 * rows[0], 1e30 * rows[1]
    np.save(tmp_path / "a.npy", rows)
    found = open_vectors(tmp_path / "a.npy")
    found.check()
    np.testing.assert_allclose(found.units(0, 2), ROWS[:2] / np.linalg.norm(ROWS[:2], axis=1, keepdims=True), rtol=1e-5)
    rows[7, 2] = 1e300  # no float32
    np.save(tmp_path / "b.npy", rows)
    with pytest.raises(InputError, match="a row is not finite, first row 7"):
        open_vectors(tmp_path / "b.npy").check()


def test_a_row_that_is_null_and_a_number_that_is(tmp_path):
    rows = [[1.0, 2.0]] * 30
    rows[25] = None
    path = written(tmp_path / "a.parquet", {"vector": pyarrow.array(rows, pyarrow.list_(pyarrow.float32()))})
    with pytest.raises(InputError, match=r"row 25 \(from 0\) has null, the first one 2 numbers"):
        open_vectors(path).check()
    rows[25] = [1.0, None]
    path = written(tmp_path / "b.parquet", {"vector": pyarrow.array(rows, pyarrow.list_(pyarrow.float32()))})
    with pytest.raises(InputError, match="a row is not finite, first row 25"):
        open_vectors(path).check()


@pytest.mark.parametrize(
    "values", [np.ones((3, 2), bool), np.ones((3, 2), complex), np.ones((3, 0)), np.ones((2, 2, 2))]
)
def test_arrays_of_something_else_are_refused(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match=r"numbers \[rows, width\] are expected"):
        open_vectors(tmp_path / "a.npy")


def test_an_archive_under_the_name_of_an_array_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", ROWS)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(InputError, match="an archive of arrays; one array is expected"):
        open_vectors(tmp_path / "a.npy")


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    path = written(tmp_path / "a.parquet", FORMS["lists"](ROWS))
    for name in ("a.npy", path.name):
        contents = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(contents[: len(contents) // 2])
        with pytest.raises(InputError, match=f"{name}: not a"):
            open_vectors(tmp_path / name).check()


def test_a_file_that_is_damaged_inside_is_refused(tmp_path):
    path = written(tmp_path / "a.parquet", FORMS["lists"](ROWS))
    contents = bytearray(path.read_bytes())
    contents[4:40] = b"x" * 36
    path.write_bytes(contents)
    with pytest.raises(InputError, match=r"a.parquet: (damaged in row group 1|not a Parquet file)"):
        open_vectors(path).check()
