"""When policies are at work, against lists of steps."""

import jax
import jax.numpy as jnp
import pytest

from dataflex_jax.policies.schedule import Schedule

STEPS = range(40)
SCHEDULES = [
    Schedule(warmup_step, update_step, update_times)
    for warmup_step in (0, 1, 4)
    for update_step in (1, 3)
    for update_times in (-1, 0, 1, 2)
]


def updates(schedule):
    """The steps after which the policy decides anew."""
    every = range(schedule.warmup_step, len(STEPS), schedule.update_step)
    return list(every if schedule.update_times < 0 else every[: schedule.update_times])


def at_work(schedule):
    """The steps that an update is followed by, before the next one would be due."""
    return [step for update in updates(schedule) for step in range(update + 1, update + schedule.update_step + 1)]


def test_updates_come_at_the_warmup_then_every_update_step_and_at_most_update_times():
    schedule = Schedule(warmup_step=4, update_step=3, update_times=2)
    assert [step for step in range(20) if schedule.is_update(step)] == [4, 7]
    assert [int(schedule.update_index(step)) for step in range(3, 12)] == [-1, 0, 0, 0, 1, 1, 1, 1, 1]
    assert [step for step in range(12) if schedule.active(step)] == [5, 6, 7, 8, 9, 10]
    assert [step for step in range(20) if schedule.every(2, step)] == [4, 6, 8]
    unlimited = schedule._replace(update_times=-1)
    assert [step for step in range(12) if unlimited.is_update(step)] == [4, 7, 10]
    assert [step for step in range(9) if unlimited.active(step)] == [5, 6, 7, 8]
    assert [step for step in range(12) if unlimited.every(4, step)] == [4, 8]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_updates_equal_the_transcription(schedule):
    assert [step for step in STEPS if schedule.is_update(step)] == updates(schedule)
    expected = [sum(update <= step for update in updates(schedule)) - 1 for step in STEPS]
    assert [int(schedule.update_index(step)) for step in STEPS] == expected
    assert jax.jit(jax.vmap(schedule.update_index))(jnp.asarray(STEPS)).tolist() == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_active_equals_the_transcription(schedule):
    expected = [step in at_work(schedule) for step in STEPS]
    assert [schedule.active(step) for step in STEPS] == expected
    assert jax.jit(jax.vmap(schedule.active))(jnp.asarray(STEPS)).tolist() == expected


def test_the_end_of_the_last_update_may_be_beyond_what_a_step_can_be():
    schedule = Schedule(warmup_step=0, update_step=2**31 - 1, update_times=2**31 - 1)
    assert jax.jit(schedule.active)(jnp.int32(1))


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_is_due_where_the_step_after_is_at_work(schedule, interval):
    expected = [step for step in STEPS[schedule.warmup_step :: interval] if step + 1 in at_work(schedule)]
    assert [step for step in STEPS if schedule.every(interval, step)] == expected
