import pytest

from dataflex_jax.aot import hlo
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.aot.cost import cost
from dataflex_jax.sharding import SELDOM
from tests.aot.texts import GATHERS, LOOP

CARD = CARDS["h100"]


def of(text, **options):
    return cost(hlo.parse(text), CARD, devices=8, **options)


def test_a_loop_counts_as_often_as_it_runs():
    found = of(LOOP)
    assert found.flops == {"tf32": 3 * 2 * 8 * 8 * 4, "bf16": 2 * 8 * 8 * 8}
    # Three times a slice of 128 bytes and its number read, the slice written, and a product; a cast; a product.
    loop = 3 * ((128 + 4 + 128) + (128 + 128 + 256))
    assert found.hbm_bytes == loop + (256 + 128) + (128 + 128 + 256)
    assert found.roofline_seconds == pytest.approx(found.hbm_bytes / CARD.bandwidth)
    assert found.fusions == {"kLoop": 3, "__triton": 1}
    assert found.collective_bytes == {"all-reduce": 256}
    assert [work.times for work in found.longest(10)].count(3) == 2
    assert found.unknown_loops == 0


def test_a_loop_that_ends_by_itself_takes_as_many_trips_as_one_says():
    text = LOOP.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert of(text).flops["tf32"] == 2 * 8 * 8 * 4
    assert of(text, trips=5).flops["tf32"] == 5 * 2 * 8 * 8 * 4
    assert of(text).unknown_loops == 1


def test_a_collective_hides_behind_what_runs_meanwhile():
    found = of(GATHERS)
    gather = 10e-6 + 7 / 8 * 2048000 / CARD.within_host
    copy = 2 * 20e6 / CARD.bandwidth
    assert gather > copy > 10e-6
    assert found.communication_seconds == pytest.approx(2 * gather)
    assert found.exposed_seconds == pytest.approx((gather - copy) + gather)
    assert found.seconds == pytest.approx(2 * gather)
    larger = of(GATHERS.replace("5000000", "50000000"))
    assert larger.exposed_seconds == pytest.approx(gather)


def test_collectives_wait_for_those_before_them():
    """Both begun at once: the second has the links after the first."""
    lines = GATHERS.splitlines()
    second = next(line for line in lines if "%second = " in line)
    lines.remove(second)
    lines.insert(next(i for i, line in enumerate(lines) if "%moved = " in line), second)
    found = of("\n".join(lines))
    gather = 10e-6 + 7 / 8 * 2048000 / CARD.within_host
    assert found.exposed_seconds == pytest.approx(2 * gather - 2 * 20e6 / CARD.bandwidth)


def test_one_that_is_not_asynchronous_is_exposed():
    found = of(GATHERS.replace("dimensions={1}\n  %moved", 'dimensions={1}, backend_config={"is_sync":true}\n  %moved'))
    assert found.exposed_seconds == pytest.approx(found.communication_seconds)


def test_asynchronous_computations_are_what_they_call():
    text = """\
HloModule m, is_scheduled=true, num_partitions=8

%scatter (p: f32[800]) -> f32[100] {
  %p = f32[800]{0} parameter(0)
  ROOT %s = f32[100]{0} reduce-scatter(%p), replica_groups={}, dimensions={0}
}

ENTRY %main (x: f32[800]) -> f32[100] {
  %x = f32[800]{0} parameter(0)
  %begun = ((f32[800]{0}), f32[100]{0}) async-start(%x), calls=%scatter
  ROOT %done = f32[100]{0} async-done(%begun)
}
"""
    found = of(text)
    assert found.collective_bytes == {"reduce-scatter": 3200}
    assert found.exposed_seconds == pytest.approx(10e-6 + 7 / 8 * 3200 / CARD.within_host)
    assert found.hbm_bytes == 0


def test_of_branches_the_longest_counts():
    text = """\
HloModule m, is_scheduled=true

%short (a: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  ROOT %c = f32[10]{0} copy(%a)
}

%long (b: f32[10]) -> f32[10] {
  %b = f32[10]{0} parameter(0)
  %c.1 = f32[10]{0} copy(%b)
  ROOT %c.2 = f32[10]{0} copy(%c.1)
}

ENTRY %main (x: f32[10], i: s32[]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %chosen = f32[10]{0} conditional(%i, %x, %x), branch_computations={%short, %long}
}
"""
    assert of(text).hbm_bytes == 2 * 80


def test_of_a_conditional_the_longer_branch_counts_unless_it_is_seldom_taken():
    text = """\
HloModule m, is_scheduled=true

%nothing (p: f32[8,8]) -> f32[8,8] {
  ROOT %p = f32[8,8]{1,0} parameter(0)
}

%product (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (x: f32[8,8], which: pred[]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %which = pred[] parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%which, %x, %x), BRANCHES, metadata={op_name="jit(f)/NAME/cond"}
}
""".replace("BRANCHES", "true_computation=%product, false_computation=%nothing")
    assert of(text.replace("NAME", "often")).flops == {"tf32": 2 * 8 * 8 * 8}
    assert of(text.replace("NAME", SELDOM)).flops == {}
