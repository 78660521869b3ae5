"""The sampler's guarantees: counts, unbiasedness, cursors, lag, and that a saved state continues exactly."""

import json

import numpy as np
import pytest

from dataflex_jax.data import sampler as s
from dataflex_jax.errors import InputError

NAMES = ("a", "b", "c", "d")
WEIGHTS = np.array([0.55, 0.3, 0.149, 0.001])


def start(weights=WEIGHTS):
    return s.SamplerState(0, np.zeros(len(weights), np.int64), weights)


def run(sampler, state, steps):
    plans = []
    for _ in range(steps):
        plan, state = sampler.plan(state)
        plans.append(plan)
    return plans, state


def test_systematic_counts_are_within_one_and_unbiased():
    sampler = s.Sampler(seed=0, batch_size=16, draw="systematic")
    plans, state = run(sampler, start(), 4000)
    counts = np.stack([np.bincount(p.domains, minlength=4) for p in plans])
    assert (counts.sum(axis=1) == 16).all()
    assert (np.abs(counts - 16 * WEIGHTS) < 1).all()
    # The offset is uniform, so a count deviates from its expectation with a variance of at most 1/4.
    assert (np.abs(counts.mean(axis=0) - 16 * WEIGHTS) < 4 * 0.5 / np.sqrt(4000)).all()
    np.testing.assert_array_equal(state.cursors, counts.sum(axis=0))


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_some_steps_may_be_drawn_more_rows_for(draw):
    plain, more = s.Sampler(5, 8, draw), s.Sampler(5, 8, draw, rows_of=lambda step: 24 if step > 2 else 8)
    (first, second, third), state = run(more, start(), 3)
    assert [len(plan.positions) for plan in (first, second, third)] == [8, 8, 24]
    assert state.cursors.sum() == 40
    for ours, expected in zip((first, second), run(plain, start(), 2)[0], strict=True):
        np.testing.assert_array_equal(ours.positions, expected.positions)
    if draw == "systematic":
        assert (np.abs(np.bincount(third.domains, minlength=4) - 24 * WEIGHTS) < 1).all()


def test_multinomial_counts_have_the_multinomial_moments():
    plans, _ = run(s.Sampler(seed=0, batch_size=16, draw="multinomial"), start(), 4000)
    counts = np.stack([np.bincount(p.domains, minlength=4) for p in plans])
    variance = 16 * WEIGHTS * (1 - WEIGHTS)
    assert (np.abs(counts.mean(axis=0) - 16 * WEIGHTS) < 4 * np.sqrt(variance / 4000)).all()
    np.testing.assert_allclose(counts.var(axis=0)[:3], variance[:3], rtol=0.15)


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_a_domain_of_weight_zero_is_never_drawn(draw):
    weights = np.array([0.0, 0.3, 0.7, 0.0])
    _, state = run(s.Sampler(1, 8, draw), start(weights), 500)
    assert state.cursors[0] == state.cursors[3] == 0


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_positions_of_a_domain_are_consecutive_whatever_the_weights_do(draw):
    sampler = s.Sampler(seed=3, batch_size=8, draw=draw)
    state = start()
    rng = np.random.default_rng(0)
    taken = {domain: [] for domain in range(4)}
    for step in range(1, 100):
        plan, state = sampler.plan(state)
        for domain, position in zip(plan.domains, plan.positions, strict=True):
            taken[int(domain)].append(int(position))
        if step % 7 == 0:
            state = s.publish(state, step + 2, rng.dirichlet(np.ones(4)))
    for domain, positions in taken.items():
        assert sorted(positions) == list(range(state.cursors[domain]))


def test_published_weights_take_effect_at_their_step_and_not_before():
    sampler = s.Sampler(seed=0, batch_size=8, draw="systematic")
    _, state = run(sampler, start(), 4)
    first, second = np.array([1.0, 0, 0, 0]), np.array([0, 1.0, 0, 0])
    state = s.publish(s.publish(state, 6, first), 7, second)
    plans, state = run(sampler, state, 4)
    drawn = [plan.drawn_with for plan in plans]
    for got, expected in zip(drawn, [WEIGHTS, first, second, second], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert state.pending == ()
    with pytest.raises(ValueError, match="the first step still open is 9"):
        s.publish(state, 8, first)
    with pytest.raises(ValueError, match="no distribution"):
        s.publish(state, 9, [np.nan, 1, 1, 1])


def test_a_state_that_went_through_json_continues_exactly():
    sampler = s.Sampler(seed=5, batch_size=8, draw="multinomial")
    _, state = run(sampler, start(np.array([1 / 3, 1 / 7, 1 / 2, 0.1])), 10)
    state = s.publish(state, 12, np.array([0.1, 0.2, 0.3, 1 / 3]))
    restored = s.from_json(json.loads(json.dumps(s.to_json(state, NAMES))), NAMES)
    for a, b in zip(run(sampler, state, 10)[0], run(sampler, restored, 10)[0], strict=True):
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)


def test_resuming_with_a_further_domain_keeps_the_cursors_and_with_one_less_is_refused():
    _, state = run(s.Sampler(5, 8, "systematic"), start(), 10)
    saved = s.to_json(state, NAMES)
    wider = s.from_json(saved, ("new", *NAMES))
    np.testing.assert_array_equal(wider.cursors, [0, *state.cursors])
    np.testing.assert_array_equal(wider.weights, [0, *state.weights])
    with pytest.raises(InputError, match="domain 'b' is missing"):
        s.from_json(saved, ("a", "c", "d"))


def test_a_plan_depends_on_seed_and_step_only():
    plans = [run(s.Sampler(seed, 8, "systematic"), start(), 3)[0] for seed in (0, 0, 1)]
    for a, b in zip(plans[0], plans[1], strict=True):
        np.testing.assert_array_equal(a.domains, b.domains)
    assert any((a.domains != b.domains).any() for a, b in zip(plans[0], plans[2], strict=True))
    assert any((plans[0][0].domains != p.domains).any() for p in plans[0][1:])


def transcribed_counts(weights, seed, step, batch_size, version):
    """Version 1: one offset, domains in their order; 2: in the order of as many uniforms, which are drawn first."""
    random = np.random.Generator(np.random.Philox(key=[seed, step]))
    order = range(len(weights))
    if version > 1:
        order = sorted(order, key=random.random(len(weights)).__getitem__)
    offset, edge, before, counts = random.random(), 0.0, 0, np.zeros(len(weights), int)
    for k in order:
        edge += weights[k]
        upper = int(np.floor(round(edge, 12) * batch_size + offset))
        counts[k], before = upper - before, upper
    return counts


@pytest.mark.parametrize("version", [1, 2])
def test_systematic_counts_equal_a_transcription(version):
    rng = np.random.default_rng(0)
    for seed in range(20):
        weights = rng.dirichlet(np.ones(6)) * np.array([1, 1, 0, 1, 1, seed % 2])
        weights /= weights.sum()
        plans, _ = run(s.Sampler(seed, 16, "systematic"), start(weights)._replace(version=version), 5)
        for plan in plans:
            counts = np.bincount(plan.domains, minlength=6)
            np.testing.assert_array_equal(counts, transcribed_counts(weights, seed, plan.step, 16, version))


def compositions(version):
    state = start(np.full(40, 1 / 40))._replace(version=version)
    plans, _ = run(s.Sampler(0, 8, "systematic"), state, 200)
    return {tuple(sorted(plan.domains)) for plan in plans}


def test_all_compositions_of_a_batch_occur():
    assert len(compositions(version=1)) == 5
    assert len(compositions(version=2)) > 190


@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
def test_a_run_goes_on_with_the_draws_that_it_began_with(draw):
    sampler = s.Sampler(3, 8, draw)
    old, new = start()._replace(version=1), start()
    saved = s.to_json(run(sampler, old, 4)[1], NAMES)
    del saved["version"]  # as checkpoints were before there was one
    restored = s.from_json(json.loads(json.dumps(saved)), NAMES)
    assert restored.version == 1
    whole = run(sampler, old, 9)[0]
    for ours, theirs in zip(run(sampler, restored, 5)[0], whole[4:], strict=True):
        np.testing.assert_array_equal(ours.domains, theirs.domains)
    assert s.from_json(s.to_json(run(sampler, new, 1)[1], NAMES), NAMES).version == s.VERSION == new.version
    same = [np.array_equal(a.domains, b.domains) for a, b in zip(run(sampler, new, 9)[0], whole, strict=True)]
    assert all(same) == (draw == "multinomial")
