"""From a selector's evidence to rows: what is chosen of too few candidates, and choices that are refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.pool import Group
from dataflex_jax.data.window import Sequences, Window
from dataflex_jax.errors import InputError
from dataflex_jax.policies import Choice, Evidence, Request, Selector
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.selection.choosing import Chooser
from tests.helpers.fake_signals import FakeRows, FakeSignals

GROUPS = (Group("a", 0, 6), Group("b", 6, 9))
SCORES = np.array([3, 1, np.nan, 5, 0, 2, 7, 8, 6], np.float32)


def best(evidence, request, num):
    ids = jnp.argsort(-evidence.rows)[:num]
    return Choice(ids, evidence.rows[ids], evidence.rows)


def chosen(counts, choose=best, **fields):
    policy = Selector(lambda state, signals, request: (Evidence(SCORES), state), choose, **fields)
    chooser = Chooser(Scheduled("mine", policy, Schedule(0, 1, -1)), SimpleNamespace(num_rows=9), GROUPS)
    request = Request(jnp.int32(1), jnp.int32(1), jax.random.key(0))
    return chooser.choose({}, FakeSignals(FakeRows(losses=SCORES)), request, counts)[0]


def test_a_choice_of_more_than_there_are_takes_each_once_before_any_again():
    found = chosen([12, 2])
    assert found.ids[found.groups[0]].tolist() == [3, 0, 5, 1, 4, 3, 0, 5, 1, 4, 3, 0]
    assert found.ids[found.groups[1]].tolist() == [7, 6]
    assert found.once == (5, 2)
    sequences = Sequences(GROUPS, seed=0)
    ids = tuple(found.ids[part] for part in found.groups)
    sequences.open(Window(4, np.zeros(2, np.int64), ids, ordered=False, once=found.once))
    drawn = [sequences.id(0, position) for position in range(24)]
    for start in (0, 5, 12, 17):
        assert sorted(drawn[start : start + 5]) == [0, 1, 3, 4, 5]
    # The best come once more, as the choice says; used up, it begins again.
    assert sorted(drawn[10:12]) == sorted(drawn[22:]) == [0, 3]
    assert len({tuple(drawn[start : start + 5]) for start in (0, 5, 12, 17)}) > 2


def test_what_may_be_taken_several_times_comes_as_often():
    def first(evidence, request, num):
        ids = jnp.zeros(num, int)
        return Choice(ids, evidence.rows[ids], evidence.rows)

    found = chosen([7, 1], first, replacement=True)
    assert found.ids[found.groups[0]].tolist() == [0] * 7
    assert found.once == (7, 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda num: jnp.zeros(num, int), "the id 0 3 times"),
        (lambda num: jnp.arange(num) + 3, "the id 5; ids from 0 to 4"),
    ],
)
def test_ids_that_no_window_can_be_made_of_are_refused(ids, message):
    with pytest.raises(InputError, match=f"^selector 'mine': choose returned {message}"):
        chosen([3, 1], lambda evidence, request, num: best(evidence, request, num)._replace(ids=ids(num)))
