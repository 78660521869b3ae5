"""GPUs that are not here: what XLA's compiler wants to know of a card, and what a card can do at most.

`cards/NAME.txtpb` is what XLA calls a target configuration, of public figures of the card.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from importlib import resources

import jax
from jax.experimental import topologies

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.hardware import peak_flops_of

CARDS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    The rates between cards are assumptions: what NCCL's collectives reach of the links (about 80 %), 450 GB/s each way
    between H100s of a host and 400 Gb/s of a network card for each out of it, 300 GB/s and 200 Gb/s with A100s.

    Attributes:
        name: as in `CARDS`.
        target_config: its target configuration.
        within_host: bytes/s that a collective moves a card, within a host.
        between_hosts: bytes/s a card out of its host.
        latency: seconds that a collective takes at least, within a host.
        latency_between_hosts: between hosts.
    """

    name: str
    target_config: str = dataclasses.field(repr=False)
    within_host: float
    between_hosts: float
    latency: float = 10e-6
    latency_between_hosts: float = 30e-6

    @classmethod
    def of(cls, name: str, **rates: float) -> "Card":
        """The card whose target configuration has this name."""
        file = resources.files("dataflex_jax.aot") / "cards" / f"{name}.txtpb"
        return cls(name, file.read_text(), **rates)

    def _field(self, field: str) -> str:
        return re.search(rf'\b{field}: "?([^"\n ]+)', self.target_config)[1]

    @property
    def device_kind(self) -> str:
        """What JAX calls it."""
        return re.search(r'device_description_str: "([^"]+)"', self.target_config)[1]

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self._field("device_memory_size"))

    @property
    def bandwidth(self) -> float:
        """Bytes/s from and to its memory."""
        return float(self._field("memory_bandwidth"))

    @property
    def compute_capability(self) -> tuple[int, int]:
        """As (9, 0)."""
        return int(self._field("cuda_compute_capability { major")), 0

    @property
    def cudnn(self) -> int:
        """The version of cuDNN, as the library gives it: 91000 for 9.10.0."""
        major, minor, patch = (int(part) for part in self._field("dnn_version").split("."))
        return 10000 * major + 100 * minor + patch

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s, by which MFU is counted."""
        return peak_flops_of(self.device_kind)

    @functools.cached_property
    def rates(self) -> Mapping[str, float]:
        """FLOP/s of matrix products by dtype; others are as float32 outside the tensor cores."""
        lanes = int(self._field("fpus_per_core")) * int(self._field("core_count"))
        plain = 2 * lanes * 1e9 * float(self._field("clock_rate_ghz"))
        peak = self.peak_flops
        return {"bf16": peak, "f16": peak, "tf32": peak / 2, "f32": plain}

    def seconds(self, flops: Mapping[str, float], num_bytes: float) -> float:
        """The roofline: the longer of computing these FLOPs (by dtype) and moving these bytes."""
        computing = sum(count / self.rates.get(dtype, self.rates["f32"]) for dtype, count in flops.items())
        return max(computing, num_bytes / self.bandwidth)

    def devices(self, count: int) -> list[jax.Device]:
        """As many of these cards as devices to compile for, 8 a host.

        Raises:
            InputError: more than 8 that are no multiple of 8, or JAX has started and found no driver.
        """
        hosts, rest = divmod(count, CARDS_PER_HOST)
        if hosts and rest and count > CARDS_PER_HOST:
            raise InputError(f"{count} devices: must be at most {CARDS_PER_HOST} or a multiple of it, so many a host")
        shape = f"1x1x{count}" if count <= CARDS_PER_HOST else f"1x{hosts}x{CARDS_PER_HOST}"
        try:
            described = topologies.get_topology_desc(
                self.name, "cuda", target_config=self.target_config, topology=shape
            )
        except NotImplementedError as error:
            # JAX leaves the plugin out where it starts, finds no driver and was not told to use CPUs alone.
            raise InputError(
                f"JAX started before it was told to use CPUs alone: set JAX_PLATFORMS=cpu ({error})"
            ) from error
        return described.devices


CARDS = {
    card.name: card
    for card in (
        Card.of("h100", within_host=370e9, between_hosts=40e9),
        Card.of("h200", within_host=370e9, between_hosts=40e9),
        Card.of("a100", within_host=230e9, between_hosts=20e9),
    )
}
