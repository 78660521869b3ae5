"""Orders: pure permutations, equal to transcriptions of their patterns and to the peer's recorded ones."""

import json

import jax
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import ScoreSource, registry
from dataflex_jax.policies.orders.cross_guidance import cross_guidance
from dataflex_jax.policies.orders.folding import folding
from dataflex_jax.policies.orders.segment import segment
from dataflex_jax.policies.orders.shuffle import shuffle
from dataflex_jax.policies.orders.sorting import sorting
from dataflex_jax.policies.orders.zigzag import zigzag
from dataflex_jax.policies.schedule import Schedule
from tests.helpers.observations import recorded

KEY = jax.random.key(7)
ORDERS = {
    "sorting": sorting(),
    "descending": sorting(ascending=False),
    "jittered": sorting(jitter=5),
    "shuffle": shuffle(),
    "folding": folding(),
    "folding_earlier": folding(L=3, polarity="higher_earlier", jitter=2),
    "zigzag": zigzag(L=4),
    "segment": segment(),
    "segment_all": segment(x_pct=50, y_pct=50, front="high", back="low"),
    "segment_low": segment(x_pct=30, y_pct=45.5, front="low", back="low"),
    "segment_high": segment(x_pct=60, y_pct=40, front="high", back="high"),
    "cross": cross_guidance(),
    "cross_folding": cross_guidance(sections=3, ratio=0.16, L=3),
    "cross_zigzag": cross_guidance(sections=5, ratio=0.09, mode="zigzag", jitter=3),
}


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 31, 97, 10_007])
@pytest.mark.parametrize("name", ORDERS)
def test_every_pattern_is_a_permutation(name, n):
    rng = np.random.default_rng(n)
    scores = np.round(rng.normal(size=n), 1)
    scores[rng.random(n) < 0.1] = np.nan
    ids = ORDERS[name].arrange(scores, KEY)
    assert np.issubdtype(ids.dtype, np.integer)
    np.testing.assert_array_equal(np.sort(ids), np.arange(n))
    np.testing.assert_array_equal(ids, ORDERS[name].arrange(scores, KEY))


def ascending_ids(scores):
    return [i for _, i in sorted((value, i) for i, value in enumerate(scores))]


def folded(ids, cycles, zigzag):
    """The ids of each cycle, one at a time."""
    out = []
    for cycle in range(cycles):
        members = [x for place, x in enumerate(ids) if place % cycles == cycle]
        out += members[::-1] if zigzag and cycle % 2 else members
    return out


SCORES = np.round(np.random.default_rng(0).normal(size=103), 1)


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("polarity", ["higher_later", "higher_earlier"])
@pytest.mark.parametrize("cycles", [1, 2, 5, 200])
def test_folding_and_zigzag_equal_the_transcription(cycles, polarity, ascending):
    ids = ascending_ids(SCORES)
    if ascending != (polarity == "higher_later"):
        ids = ids[::-1]
    options = dict(polarity=polarity, ascending=ascending)
    np.testing.assert_array_equal(sorting(**options).arrange(SCORES, KEY), ids)
    np.testing.assert_array_equal(folding(L=cycles, **options).arrange(SCORES, KEY), folded(ids, cycles, False))
    np.testing.assert_array_equal(zigzag(L=cycles, **options).arrange(SCORES, KEY), folded(ids, cycles, True))


@pytest.mark.parametrize("mode", ["folding", "zigzag"])
@pytest.mark.parametrize(("sections", "ratio", "cycles"), [(1, 0.3, 2), (2, 0.0, 2), (2, 0.2, 3), (4, 0.1, 2)])
def test_cross_guidance_applies_the_pattern_around_the_borders_only(sections, ratio, cycles, mode):
    n = 120
    scores = np.random.default_rng(1).permutation(n).astype(float)
    expected = ascending_ids(scores)
    for border in range(1, sections):
        first, last = n * border // sections - round(ratio * n), n * border // sections + round(ratio * n)
        expected[first:last] = folded(expected[first:last], cycles, mode == "zigzag")
    order = cross_guidance(sections=sections, ratio=ratio, L=cycles, mode=mode)
    np.testing.assert_array_equal(order.arrange(scores, KEY), expected)


def test_surroundings_that_rounding_makes_meet_are_not_rearranged_twice():
    """Borders 4 and 7 of 11 ids reach to [2, 6) and [5, 9); the second begins where the first ends."""
    out = cross_guidance(sections=3, ratio=0.166).arrange(np.arange(11.0), KEY)
    np.testing.assert_array_equal(out, [0, 1, 2, 4, 3, 5, 6, 8, 7, 9, 10])


@pytest.mark.parametrize("front", ["low", "high"])
@pytest.mark.parametrize("back", ["low", "high"])
def test_segment_takes_its_ends_from_the_tails(front, back):
    n = 200
    scores = np.random.default_rng(2).permutation(n).astype(float)
    order = segment(x_pct=10, y_pct=15, front=front, back=back)
    out = scores[order.arrange(scores, KEY)]
    first, middle, last = out[:20], out[20:170], out[170:]
    ranked = np.arange(n)
    if front == back:
        tail = ranked[:50] if front == "low" else ranked[-50:]
        np.testing.assert_array_equal(np.sort([*first, *last]), tail)
        assert first.min() < last.max()
        assert last.min() < first.max()
    else:
        np.testing.assert_array_equal(np.sort(first), ranked[:20] if front == "low" else ranked[-20:])
        np.testing.assert_array_equal(np.sort(last), ranked[:30] if back == "low" else ranked[-30:])
    assert abs(np.corrcoef(middle, np.arange(150))[0, 1]) < 0.3
    other = scores[order.arrange(scores, jax.random.key(8))]
    for part in (slice(20), slice(20, 170), slice(170, None)):
        assert (out[part] != other[part]).any()


@pytest.mark.parametrize("window", [2, 16])
def test_jitter_stays_inside_its_windows(window):
    plain = folding(L=3).arrange(SCORES, KEY)
    out = folding(L=3, jitter=window).arrange(SCORES, KEY)
    for start in range(0, len(plain), window):
        assert set(out[start : start + window]) == set(plain[start : start + window])
    assert (out != plain).mean() > 0.3
    np.testing.assert_array_equal(folding(L=3, jitter=1).arrange(SCORES, KEY), plain)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "shuffle"])
def test_rows_without_a_score_come_last_in_incoming_order(name):
    scores = SCORES.copy()
    unscored = [3, 40, 41, 99]
    scores[unscored] = np.nan
    scores[[0, 1]] = np.inf, -np.inf
    out = ORDERS[name].arrange(scores, KEY)
    np.testing.assert_array_equal(out[-4:], unscored)


def test_equal_scores_keep_their_order():
    np.testing.assert_array_equal(sorting().arrange(np.array([2.0, 1, 2, 1, 1]), KEY), [1, 3, 4, 0, 2])


def test_shuffle_is_uniform_needs_no_scores_and_depends_on_the_key():
    order = shuffle()
    assert order.scores == ScoreSource("none")
    first, second = (order.arrange(np.full(1000, np.nan), jax.random.key(seed)) for seed in (0, 1))
    assert (first != second).mean() > 0.9
    places = np.array([order.arrange(np.zeros(4), jax.random.key(seed)) for seed in range(1500)])
    for candidate in range(4):
        np.testing.assert_allclose((places == candidate).mean(axis=0), 0.25, atol=0.06)


@pytest.mark.parametrize("name", ["sorting", "shuffle", "folding", "zigzag", "segment", "cross_guidance"])
def test_builds_from_its_default_section(name):
    order = registry.build("order", registry.policy_config("order", name), Schedule(0, 1, -1)).policy
    assert order.dynamic is False
    assert order.scores == ScoreSource("none" if name == "shuffle" else "loss")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sorting", "scores", ""),
        ("sorting", "polarity", "up"),
        ("sorting", "jitter", -1),
        ("folding", "L", 0),
        ("zigzag", "L", 0),
        ("segment", "x_pct", -1.0),
        ("segment", "y_pct", 95.0),
        ("segment", "front", "middle"),
        ("segment", "back", "middle"),
        ("cross_guidance", "sections", 0),
        ("cross_guidance", "ratio", 0.25),
        ("cross_guidance", "ratio", -0.1),
        ("cross_guidance", "L", 0),
        ("cross_guidance", "mode", "sawtooth"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(name, option, value):
    section = registry.policy_config("order", name)
    section[option] = value
    with pytest.raises(InputError, match=rf"^config\.order\.{option} = "):
        registry.build("order", section, Schedule(0, 1, -1))


@pytest.mark.parametrize("name", ["sorting", "sorting_desc", "folding", "zigzag", "stair", "saw"])
def test_equals_the_peers_recorded_permutations(name):
    numbers = recorded("reorder_patterns.npz")
    peer = json.loads(str(numbers[f"par/{name}"]))
    options = {ours: peer[theirs] for theirs, ours in PEER_NAMES.items() if theirs in peer}
    if name in ("stair", "saw"):
        order = cross_guidance(mode="folding" if name == "stair" else "zigzag", **options)
    else:
        order = {"sorting": sorting, "sorting_desc": sorting, "folding": folding, "zigzag": zigzag}[name](**options)
    ids = order.arrange(numbers["scores"], KEY)
    np.testing.assert_array_equal(numbers["positions"][ids], numbers[f"out/{name}"])


PEER_NAMES = {"layers": "L", "num_sections": "sections", "folding_ratio": "ratio", "ascending": "ascending"}


@pytest.mark.parametrize(
    ("name", "options"),
    [("segment", dict(x_pct=10, y_pct=10)), ("segment_same", dict(x_pct=15, y_pct=10, front="high", back="high"))],
)
def test_segments_have_the_peers_members(name, options):
    numbers = recorded("reorder_patterns.npz")
    ids = segment(**options).arrange(numbers["scores"], KEY)
    ours, theirs = numbers["positions"][ids], numbers[f"out/{name}"]
    x, y = (97 * options[share] // 100 for share in ("x_pct", "y_pct"))
    ends = [[*order[:x], *order[97 - y :]] for order in (ours, theirs)]
    assert set(ends[0]) == set(ends[1])
    if name == "segment":
        assert set(ours[:x]) == set(theirs[:x])
