"""Batches: padding, what a packed row adds, how rows lie on the devices, and that jax sees through them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import Batch, collated, on_devices, smallest_bucket
from dataflex_jax.data.rows import Row
from dataflex_jax.sharding import make_mesh

# The arrays, without `targets`, which are other rows.
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name not in ("targets", "most_segments")]


def row(first, length, *, packed=False):
    """`length` inputs that count up from `first`, every other prediction in the loss; packed: two examples."""
    segments = positions = None
    if packed:
        segments = np.arange(length, dtype=np.int32) * 2 // length + 1
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in np.bincount(segments)[1:]])
    return Row(np.arange(first, first + length + 1, dtype=np.int32), np.arange(length) % 2 == 0, segments, positions)


def test_rows_are_padded_on_the_right():
    batch = collated([row(10, 3), row(20, 5)], 6, [2, 0])
    np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 13, 0, 0, 0], [20, 21, 22, 23, 24, 25, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(batch.lengths, [3, 5])
    np.testing.assert_array_equal(batch.domain, [2, 0])
    dtypes = {name: getattr(batch, name).dtype for name in ("tokens", "mask", "lengths", "domain")}
    assert dtypes == {"tokens": np.int32, "mask": np.float32, "lengths": np.int32, "domain": np.int32}
    assert [name for name in FIELDS if getattr(batch, name) is None] == [
        *("drawn_with", "segment_ids", "positions", "reference_losses", "record_numbers")
    ]


def test_packed_rows_have_segments_from_one_and_positions_in_their_example():
    batch = collated([row(10, 4, packed=True), row(20, 3, packed=True)], 5, [0, 0], packed=True)
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 2, 2, 0], [1, 1, 2, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]])
    assert batch.segment_ids.dtype == batch.positions.dtype == np.int32


@pytest.mark.parametrize("packed", [False, True])
def test_no_row_is_a_row_of_padding(packed):
    batch = collated([None, row(10, 4, packed=packed), None], 4, [0, 1, 0], packed=packed)
    np.testing.assert_array_equal(batch.lengths, [0, 4, 0])
    np.testing.assert_array_equal(batch.row_tokens, [0, 2, 0])
    for name in ("tokens", "mask", *(("segment_ids", "positions") if packed else ())):
        assert not getattr(batch, name)[[0, 2]].any()


def test_a_row_longer_than_the_batch_is_refused():
    with pytest.raises(ValueError, match="broadcast"):
        collated([row(10, 5)], 4, [0])


def test_the_smallest_bucket_holds_the_longest_row():
    assert [smallest_bucket([1, n], (4, 8)) for n in (2, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(ValueError, match="longer than the largest bucket"):
        smallest_bucket([1, 9], (4, 8))


def test_real_inputs_are_those_before_the_padding_whether_they_count_or_not():
    batch = collated([row(10, 3), None, row(20, 4)], 4, [0, 0, 0])
    np.testing.assert_array_equal(batch.real_inputs, [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.row_tokens, [2, 0, 2])
    assert batch.real_inputs.dtype == jnp.float32
    assert batch.num_rows == 3


def whole_batch(rows=8):
    """With every field there is."""
    batch = collated([row(10 * b, 1 + b % 4, packed=True) for b in range(rows)], 4, np.arange(rows) % 3, packed=True)
    losses = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    of_rows = {"reference_losses": losses, "record_numbers": losses + 1}
    proportions = np.array([0.5, 0.3, 0.2], np.float32)
    return dataclasses.replace(batch, drawn_with=proportions, most_segments=3, **of_rows)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_are_split_over_the_devices_and_proportions_are_not(axes):
    mesh, batch = make_mesh(axes), whole_batch()
    placed = on_devices(mesh, batch)
    shards = axes.get("data", 1) * axes["fsdp"]
    for name in FIELDS:
        ours, expected = getattr(placed, name), getattr(batch, name)
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == expected.dtype
        assert len(ours.sharding.device_set) == 8
        first = expected.shape[0] // (1 if name == "drawn_with" else shards)
        assert ours.sharding.shard_shape(ours.shape) == (first, *expected.shape[1:])
    assert placed.most_segments == 3
    assert on_devices(mesh, batch.rows_alone()).drawn_with is None


def test_a_batch_passes_through_jit_and_what_is_missing_stays_so():
    batch = collated([row(10, 3), row(20, 4)], 4, [1, 0])
    same = jax.jit(lambda batch: batch)(batch)
    assert isinstance(same, Batch)
    for name in FIELDS:
        ours, expected = getattr(same, name), getattr(batch, name)
        if expected is None:
            assert ours is None
        else:
            np.testing.assert_array_equal(ours, expected)


def test_rows_alone_can_be_mapped_over_one_by_one():
    batch = whole_batch()
    rows = batch.rows_alone()
    assert [name for name in FIELDS if getattr(rows, name) is None] == ["drawn_with"]
    counts = jax.jit(jax.vmap(lambda row: jnp.sum(row.mask) + row.lengths + 100 * row.domain))(rows)
    np.testing.assert_array_equal(counts, batch.row_tokens + batch.lengths + 100 * batch.domain)


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_token_may_be_an_input_too(packed):
    rows = [row(10, 4, packed=packed), row(20, 6, packed=packed), None]
    batch = jax.tree.map(jnp.asarray, collated(rows, 6, [0, 1, 0], packed=packed))
    seen = jax.jit(Batch.with_last_inputs)(batch)
    np.testing.assert_array_equal(seen.lengths, [5, 7, 0])
    np.testing.assert_array_equal(seen.real_inputs.sum(axis=1), [5, 7, 0])
    np.testing.assert_array_equal(seen.tokens[:, :-1], batch.tokens)
    np.testing.assert_array_equal(seen.mask, np.pad(batch.mask, ((0, 0), (0, 1))))
    if packed:
        np.testing.assert_array_equal(seen.segment_ids[:2], [[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 2, 2]])
        np.testing.assert_array_equal(seen.positions[:2], [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1, 2, 3]])
        assert not np.any(seen.segment_ids[2])
