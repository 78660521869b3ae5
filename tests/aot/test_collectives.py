import pytest

from dataflex_jax.aot import hlo
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.aot.collectives import Transfer, first_group, transfer
from tests.aot.texts import GATHERS, LOOP


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups={}, dimensions={0}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        # arange(8) as [2, 4], transposed to [4, 2]: rows 0 4, 1 5, ...
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, channel_id=1", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        # Of an axis of 8 the 2 after the first 2: steps of 2.
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", (0, 2)),
        ("source_target_pairs={{3,1},{1,3}}", (1, 3)),
    ],
)
def test_groups_of_devices(text, group):
    assert first_group(f", {text}, use_global_device_ids=true", 8) == group


def test_what_is_moved():
    module = hlo.parse(GATHERS)
    main = module.computations[module.entry]
    gather = transfer(main, main["first"], 8)
    assert gather == Transfer("all-gather", {"bf16": 2 * 1024 * 1000}, tuple(range(8)))
    assert transfer(main, main["moved"], 8) is None
    module = hlo.parse(LOOP)
    main = module.computations[module.entry]
    assert transfer(main, main["reduced"], 8) == Transfer("all-reduce", {"f32": 256}, (0, 1))


def test_a_scatter_counts_what_it_is_given():
    text = """\
HloModule m, is_scheduled=true

ENTRY %main (a: f32[8,4], b: bf16[8]) -> (f32[1,4], bf16[1]) {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[8]{0} parameter(1)
  ROOT %s = ((f32[8,4]{1,0}, bf16[8]{0}), (f32[1,4]{1,0}, bf16[1]{0})) reduce-scatter-start(%a, %b), replica_groups={}
}
"""
    main = hlo.parse(text).computations["main"]
    scatter = transfer(main, main.root, 8)
    assert scatter == Transfer("reduce-scatter", {"f32": 128, "bf16": 16}, tuple(range(8)))
    assert scatter.bytes == 144


def test_times_of_a_ring():
    card = CARDS["h100"]
    moved = {"f32": 10**9}
    eight, thirty_two, across = tuple(range(8)), tuple(range(32)), tuple(range(0, 32, 8))
    seconds = {
        name: Transfer(kind, moved, group).seconds(card)
        for name, kind, group in (
            ("gather", "all-gather", eight),
            ("reduce", "all-reduce", eight),
            ("permute", "collective-permute", (0, 1)),
            ("hosts", "all-gather", thirty_two),
            ("across", "all-gather", across),
            ("alone", "all-reduce", (3,)),
        )
    }
    assert seconds["gather"] == pytest.approx(10e-6 + 7 / 8 * 1e9 / 370e9)
    assert seconds["reduce"] == pytest.approx(10e-6 + 2 * 7 / 8 * 1e9 / 370e9)
    assert seconds["permute"] == pytest.approx(10e-6 + 1e9 / 370e9)
    # All eight network cards of a host, or one.
    assert seconds["hosts"] == pytest.approx(30e-6 + 31 / 32 * 1e9 / 320e9)
    assert seconds["across"] == pytest.approx(30e-6 + 3 / 4 * 1e9 / 40e9)
    assert seconds["alone"] == 0
