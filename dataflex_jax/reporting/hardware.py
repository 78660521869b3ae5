"""What the hardware can do and what a run has taken of it: peak FLOP/s, memory and its peak."""

import os
import re
import resource
import sys
from typing import NamedTuple

import jax

# Dense (no structured sparsity) bfloat16 matrix FLOP/s with float32 accumulation, a JAX device, from the vendors'
# datasheets; where a sheet gives the sparse figure only, half of it. V100 and T4 have no bfloat16: float16 is given.
# The first pattern that matches the whole device kind counts, so the narrower of two names stands first.
_TERA = 1e12
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA GB200.*", 2500 * _TERA),  # GB200 NVL72, per GPU
    (r"NVIDIA B200.*", 2250 * _TERA),  # HGX B200
    (r"NVIDIA H200 NVL", 835.5 * _TERA),
    (r"NVIDIA (H200|GH200).*", 989.4 * _TERA),
    (r"NVIDIA (H100|H800) PCIe", 756.5 * _TERA),
    (r"NVIDIA H100 NVL", 835.5 * _TERA),
    (r"NVIDIA (H100|H800).*HBM3.*", 989.4 * _TERA),  # SXM5
    (r"NVIDIA H20", 148 * _TERA),
    (r"(NVIDIA )?(A100|A800)\b.*", 312 * _TERA),
    (r"NVIDIA L40S", 362.05 * _TERA),
    (r"NVIDIA L40", 181.05 * _TERA),
    (r"NVIDIA L4", 121 * _TERA),
    (r"NVIDIA A10G", 70 * _TERA),
    (r"NVIDIA A10", 125 * _TERA),
    (r"(NVIDIA )?GeForce RTX 4090", 165.2 * _TERA),  # Ada whitepaper
    (r"(NVIDIA )?GeForce RTX 3090", 71 * _TERA),  # GA102 whitepaper
    (r"Tesla V100S-PCIE.*", 130 * _TERA),
    (r"Tesla V100-PCIE.*", 112 * _TERA),
    (r"Tesla V100-SXM[23].*", 125 * _TERA),
    (r"(Tesla|NVIDIA) T4", 65 * _TERA),
    (r"TPU v4", 275 * _TERA),
    (r"TPU (v5 lite|v5e)", 197 * _TERA),
    (r"TPU (v5|v5p)", 459 * _TERA),
    (r"TPU (v6 lite|v6e)", 918 * _TERA),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 peak of one device [FLOP/s] (float16 where it has no bfloat16); None where it is not known.

    A slice of a GPU (MIG) has no known peak: its name tells the slice, not the share of the clock.
    """
    return peak_flops_of(device.device_kind)


def peak_flops_of(kind: str) -> float | None:
    """`peak_flops` of a device of this kind, as JAX calls it."""
    if "MIG" in kind.split():
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, kind)), None)


def total_peak_flops() -> float | None:
    """`peak_flops` of all devices of all hosts together."""
    peaks = [peak_flops(device) for device in jax.devices()]
    return None if None in peaks else sum(peaks)


def total_memory_bytes() -> int | None:
    """Memory of all devices of all hosts together, on CPU that of the hosts; None where the platform does not tell."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        here = None if None in limits else sum(limits)
    return None if here is None else here * jax.process_count()


class PeakMemory(NamedTuple):
    """Peak memory and what it is a measure of.

    Attributes:
        bytes: None where the platform does not tell.
        measure: "device" (the fullest local device, as its allocator counts) or "process" (resident memory, on CPU).
    """

    bytes: int | None
    measure: str


def peak_memory_bytes() -> PeakMemory:
    """The most memory this process has used so far: on the fullest of its accelerators, or on CPU of the host."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process")
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return PeakMemory(max(known) if known else None, "device")
