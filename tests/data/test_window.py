"""What the groups draw from: shuffled epochs, and windows in their place."""

import numpy as np
import pytest

from dataflex_jax.data import window as windows
from dataflex_jax.data.pool import Group
from dataflex_jax.data.sampler import Plan
from dataflex_jax.data.window import Sequences, Window

GROUPS = (Group("a", 0, 10), Group("b", 10, 17))


def drawn(sequences, group, start, count):
    return [sequences.id(group, position) for position in range(start, start + count)]


def test_without_a_window_each_epoch_is_a_shuffle_of_all_rows():
    sequences = Sequences(GROUPS, seed=3)
    for group in (0, 1):
        members = list(range(GROUPS[group].start, GROUPS[group].stop))
        epochs = [drawn(sequences, group, start, len(members)) for start in (0, len(members))]
        assert [sorted(epoch) for epoch in epochs] == [members, members]
        assert epochs[0] != epochs[1] != members
        np.testing.assert_array_equal(sequences.upcoming(group, 3, 9), drawn(sequences, group, 3, 9))
    assert drawn(Sequences(GROUPS, seed=4), 0, 0, 10) != drawn(sequences, 0, 0, 10)


def test_a_group_does_not_depend_on_the_others():
    alone = Sequences(GROUPS[:1], seed=3)
    assert drawn(alone, 0, 0, 30) == drawn(Sequences(GROUPS, seed=3), 0, 0, 30)


def test_chosen_rows_come_in_another_shuffle_at_every_pass_and_every_update():
    ids = (np.array([9, 2, 4, 7, 1, 0]), np.array([12, 11]))
    passes = []
    for step in (5, 6):
        sequences = Sequences(GROUPS, seed=3)
        sequences.open(Window(step, np.array([40, 7]), ids, ordered=False))
        passes += [drawn(sequences, 0, start, 6) for start in (40, 46)]
        assert sorted(drawn(sequences, 1, 7, 4)) == [11, 11, 12, 12]
    assert all(sorted(once) == sorted(ids[0]) for once in passes)
    assert len({tuple(once) for once in (*passes, ids[0].tolist())}) == 5


def test_the_beginning_of_a_window_is_what_comes_first_once_it_is_opened():
    window = Window(5, np.array([40, 7]), (np.array([9, 2, 4]), np.array([12, 11])), ordered=False)
    sequences, opened = Sequences(GROUPS, seed=3), Sequences(GROUPS, seed=3)
    opened.open(window)
    first, second = sequences.beginning(window, [7, 1])
    assert first.tolist() == drawn(opened, 0, 40, 7)
    assert second.tolist() == drawn(opened, 1, 7, 1)
    assert drawn(sequences, 0, 0, 5) == drawn(Sequences(GROUPS, seed=3), 0, 0, 5)


def test_a_row_that_was_chosen_twice_comes_twice():
    sequences = Sequences(GROUPS, seed=0)
    sequences.open(Window(0, np.zeros(2, np.int64), (np.array([3, 3, 5]), np.array([10])), ordered=False))
    assert sorted(drawn(sequences, 0, 0, 3)) == [3, 3, 5]


def test_each_comes_once_before_any_comes_again():
    ids, starts = np.array([9, 2, 4, 9, 2, 4, 9]), np.array([40, 7])
    sequences = Sequences(GROUPS, seed=3)
    sequences.open(Window(5, starts, (ids, np.array([12, 11])), ordered=False, once=(3, 2)))
    came = drawn(sequences, 0, 40, 210)
    for first in range(0, 210, 7):
        assert sorted(came[first : first + 3]) == sorted(came[first + 3 : first + 6]) == [2, 4, 9]
        assert came[first + 6] == 9
    assert len({tuple(came[first : first + 3]) for first in range(0, 210, 7)}) == 6
    alone = Sequences(GROUPS, seed=3)
    alone.open(Window(5, starts, (ids, np.array([12, 11])), ordered=False))
    assert drawn(alone, 1, 7, 20) == drawn(sequences, 1, 7, 20)


def test_ordered_rows_come_as_they_are_again_and_again():
    sequences = Sequences(GROUPS, seed=3)
    sequences.open(Window(5, np.array([40, 7]), (np.array([9, 2, 4]), np.array([16, 12])), ordered=True))
    assert drawn(sequences, 0, 40, 7) == [9, 2, 4, 9, 2, 4, 9]
    plan = Plan(6, np.array([1, 0, 1]), np.array([7, 41, 9]), np.array([0.5, 0.5]))
    assert sequences.ids(plan).tolist() == [16, 2, 16]


def test_what_only_rearranges_the_coming_rows_ends_with_them():
    plain, sequences = Sequences(GROUPS, seed=3), Sequences(GROUPS, seed=3)
    coming = plain.upcoming(0, 4, 12)
    sequences.open(Window(2, np.array([4, 0]), (coming[::-1], np.array([10])), ordered=True, repeats=False))
    assert drawn(sequences, 0, 4, 12) == coming[::-1].tolist()
    assert drawn(sequences, 0, 16, 20) == drawn(plain, 0, 16, 20)


def test_a_window_that_was_not_used_up_goes_on_in_the_next_one():
    """A mixer may draw fewer or more rows of a group than were expected when its window was opened."""
    plain, sequences = Sequences(GROUPS, seed=3), Sequences(GROUPS, seed=3)
    natural, came, cursor = drawn(plain, 0, 0, 60), [], 0
    for expected, taken in ((8, 3), (4, 4), (9, 12), (3, 2), (0, 0), (6, 31)):
        rows = sequences.upcoming(0, cursor, expected)
        window = Window(len(came), np.array([cursor, 0]), (rows[::-1], np.array([10])), ordered=True, repeats=False)
        sequences.open(window)
        came += drawn(sequences, 0, cursor, taken)
        cursor += taken
        still = drawn(sequences, 0, cursor, 60 - cursor)
        assert sorted(came + still) == sorted(natural)
    assert came != natural[: len(came)]


def test_none_closes_a_window():
    sequences = Sequences(GROUPS, seed=3)
    before = drawn(sequences, 0, 0, 10)
    sequences.open(Window(0, np.zeros(2, np.int64), (np.array([3]), np.array([10])), ordered=True))
    sequences.open(None)
    assert drawn(sequences, 0, 0, 10) == before


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("once", [None, (2, 1)])
def test_a_window_survives_a_checkpoint(ordered, repeats, once):
    window = Window(5, np.array([40, 7]), (np.array([9, 2, 4]), np.array([16])), ordered, repeats, once)
    back = windows.from_arrays(windows.to_arrays(window))
    assert (back.step, back.ordered, back.repeats, back.once) == (5, ordered, repeats, once)
    np.testing.assert_array_equal(back.starts, window.starts)
    for ours, theirs in zip(back.ids, window.ids, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert windows.from_arrays(windows.to_arrays(None)) is None
