"""Vectors in Parquet files: in one column of lists, or a column a dimension. Read by row groups."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dataflex_jax.errors import InputError, one_line


def open_parquet(path: Path) -> tuple[int, int, Callable[[int, int], np.ndarray]]:
    """How many vectors, of how many numbers, and what reads those from a first one up to a last one.

    Raises:
        InputError: no Parquet file, or one of something else; from what reads, a vector of another width.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({one_line(error)})") from error
    schema, num_rows = file.schema_arrow, file.metadata.num_rows
    in_lists = len(schema) == 1 and _is_list(schema.types[0])
    types = [schema.types[0].value_type] if in_lists else schema.types
    if not types or not all(pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind) for kind in types):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(
            f"{path}: has the columns {one_line(columns) or 'none'}; one column of lists of numbers, or columns of "
            "numbers only, are expected"
        )
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])

    @functools.lru_cache(maxsize=1)
    def table(number: int) -> pyarrow.Table:
        try:
            return file.read_row_group(number)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged in row group {number + 1} ({one_line(error)})") from error

    @functools.lru_cache(maxsize=1)
    def of_group(number: int) -> np.ndarray:
        before = int(ends[number - 1]) if number else 0
        return _of_lists(path, table(number).column(0), width, before) if in_lists else _of_columns(table(number))

    width = len(schema)
    if in_lists:
        filled = int(np.searchsorted(ends, 0, side="right"))
        width = len(table(filled).column(0)[0].as_py() or ()) if num_rows else 0

    def read(first: int, stop: int) -> np.ndarray:
        parts = []
        for number in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
            before = int(ends[number - 1]) if number else 0
            if before >= stop:
                break
            parts.append(of_group(number)[max(first - before, 0) : stop - before])
        return np.concatenate(parts)

    return num_rows, width, read


def _is_list(kind: pyarrow.DataType) -> bool:
    kinds = pyarrow.types
    return kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)


def _of_lists(path: Path, column: pyarrow.ChunkedArray, width: int, before: int) -> np.ndarray:
    lengths = pyarrow.compute.list_value_length(column).to_numpy()  # NaN of null
    if (lengths != width).any():
        wrong = int(np.argmax(lengths != width))
        found = "null" if math.isnan(lengths[wrong]) else f"{int(lengths[wrong])} numbers"
        raise InputError(f"{path}: row {before + wrong} (from 0) has {found}, the first one {width} numbers")
    return pyarrow.compute.list_flatten(column).to_numpy().reshape(-1, width)


def _of_columns(table: pyarrow.Table) -> np.ndarray:
    return np.column_stack([column.to_numpy() for column in table.columns])
