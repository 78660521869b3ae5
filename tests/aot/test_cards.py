import pytest
from jax.experimental import topologies

from dataflex_jax.aot.cards import CARDS
from dataflex_jax.errors import InputError


# Datasheets: GB, TB/s, TFLOP/s in bfloat16 and in float32 without tensor cores.
@pytest.mark.parametrize(
    ("name", "memory", "bandwidth", "peak", "plain", "capability"),
    [
        ("h100", 80, 3.35, 989.4, 66.9, (9, 0)),
        ("h200", 141, 4.8, 989.4, 66.9, (9, 0)),
        ("a100", 80, 2.039, 312, 19.5, (8, 0)),
    ],
)
def test_a_card_is_as_its_datasheet_says(name, memory, bandwidth, peak, plain, capability):
    card = CARDS[name]
    assert card.memory / 1e9 == pytest.approx(memory, rel=0.08)  # sheets count in either of two units
    assert card.bandwidth == pytest.approx(1e12 * bandwidth, rel=1e-3)
    assert card.rates["bf16"] == card.peak_flops == 1e12 * peak
    assert card.rates["tf32"] == card.peak_flops / 2
    assert card.rates["f32"] == pytest.approx(1e12 * plain, rel=1e-3)
    assert card.compute_capability == capability
    assert card.cudnn == 91000


def test_the_roofline_is_the_longer_of_two():
    card = CARDS["h100"]
    assert card.seconds({}, card.bandwidth) == 1
    assert card.seconds({"bf16": card.peak_flops}, 1) == 1
    assert card.seconds({"bf16": card.peak_flops, "f64": card.rates["f32"]}, card.bandwidth) == 2


def test_where_jax_has_started_without_the_plugin_one_line_says_so(monkeypatch):
    def unknown(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    with pytest.raises(InputError, match=r"set JAX_PLATFORMS=cpu \(topology not implemented for cuda\)$"):
        CARDS["h100"].devices(8)


def test_hosts_have_eight():
    with pytest.raises(InputError, match="12 devices: must be at most 8 or a multiple of it"):
        CARDS["h100"].devices(12)
