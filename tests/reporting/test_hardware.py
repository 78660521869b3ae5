import os
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dataflex_jax.reporting.hardware import peak_flops, peak_memory_bytes


# Names as drivers give them (nvidia-smi -L, jax.devices()) and TFLOP/s.
@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla T4", 65),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_peak_flops_by_name(kind, tera):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == pytest.approx(tera * 1e12, rel=1e-12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "TPU v4 lite",
        "NVIDIA Imaginary",
    ],
)
def test_peak_flops_unknown(kind):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) is None


def test_peak_memory_on_cpu_is_the_process():
    if jax.local_devices()[0].platform != "cpu":
        pytest.skip("needs the CPU backend")
    before = peak_memory_bytes()
    assert before.measure == "process"
    # Python, numpy and JAX take more than 50 MB and less than 100 GB: the unit is right.
    assert 50e6 < before.bytes < 100e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # that it has now
    np.ones(before.bytes - pages * os.sysconf("SC_PAGE_SIZE") + 2**28, np.uint8)
    assert before.bytes + 2**27 < peak_memory_bytes().bytes < before.bytes + 2**29


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    def device(stats):
        return types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    monkeypatch.setattr(
        jax, "local_devices", lambda: [device({"peak_bytes_in_use": 5}), device({"peak_bytes_in_use": 9})]
    )
    assert peak_memory_bytes() == (9, "device")
    monkeypatch.setattr(jax, "local_devices", lambda: [device(None), device({"bytes_in_use": 1})])
    assert peak_memory_bytes() == (None, "device")
