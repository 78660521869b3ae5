"""From a selector's evidence to rows: what is chosen of too few candidates, and choices that are refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.pool import Group, Pool
from dataflex_jax.data.window import Sequences, Window
from dataflex_jax.errors import InputError
from dataflex_jax.policies import Choice, Evidence, Request, Selector
from dataflex_jax.policies.schedule import Schedule, Scheduled
from dataflex_jax.selection.choosing import Chooser, Chosen, described, share_of
from tests.helpers.fake_signals import FakeRows, FakeSignals

GROUPS = (Group("a", 0, 6), Group("b", 6, 9))
SCORES = np.array([3, 1, np.nan, 5, 0, 2, 7, 8, 6], np.float32)


def best(evidence, request, num):
    ids = jnp.argsort(-evidence.rows)[:num]
    return Choice(ids, evidence.rows[ids], evidence.rows)


def chosen(counts, choose=best, again=True, **fields):
    policy = Selector(lambda state, signals, request: (Evidence(SCORES), state), choose, **fields)
    chooser = Chooser(Scheduled("mine", policy, Schedule(0, 1, -1)), SimpleNamespace(num_rows=9), GROUPS)
    request = Request(jnp.int32(1), jnp.int32(1), jax.random.key(0))
    return chooser.choose({}, FakeSignals(FakeRows(losses=SCORES)), request, counts, again=again)[0]


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


def test_what_is_kept_of_too_few_candidates_is_all_of_them_once():
    found = chosen([6, 2], again=False)
    assert found.ids.tolist() == [3, 0, 5, 1, 4, 7, 6]
    assert found.groups == (slice(0, 5), slice(5, 7))
    assert [share_of(share, 9) for share in (1.0, 0.5, 0.01)] == [9, 4, 1]


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


def test_a_choice_is_described_by_domain_and_by_what_was_chosen_before():
    sizes = {"a": 6, "b": 3, "c": 5}
    rows = {name: SimpleNamespace(num_rows=size, buckets=(8,), packed=False) for name, size in sizes.items()}
    pool = Pool([SimpleNamespace(name=name, train=each) for name, each in rows.items()])
    ids = np.array([8, 0, 5, 0, 6, 7, 1, 2])
    scores = np.array([8, 3, 2, 3, 1, 0, -1, -2], np.float32)
    choice = Chosen(ids, scores, np.zeros(14, np.float32), (slice(0, 8),), (8,), 2)
    found = described(choice, pool, None)
    assert found == {
        **{"selected": 8, "distinct": 7, "not_finite": 2, "domain_share": {"a": 0.625, "b": 0.375, "c": 0.0}},
        **{"overlap": None, "score_min": -2, "score_mean": 1.75, "score_max": 8},
    }
    # Of the 7 distinct ones, in whatever order and however often they were chosen before.
    assert described(choice, pool, np.array([13, 2, 8, 2, 12]))["overlap"] == 2 / 7
