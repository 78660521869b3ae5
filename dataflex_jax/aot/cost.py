"""What a compiled program takes of a card: FLOPs, memory traffic, collectives, and the least time of all that.

The program is gone through in the order of its schedule. An instruction takes its roofline time; a collective runs
beside the others from its start on, after those begun before it, and what of it is left when its result is wanted is
*exposed*. Launches and everything that is not a matrix product or memory traffic count nothing, so times are lower
bounds, for comparing programs.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from dataflex_jax.aot.cards import Card
from dataflex_jax.aot.collectives import Transfer, transfer
from dataflex_jax.aot.hlo import Instruction, Module
from dataflex_jax.aot.work import flops, hbm_bytes
from dataflex_jax.sharding import SELDOM

# Names for what is there already; what ends something that runs beside is counted where it begins.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")


class Work(NamedTuple):
    """An instruction as it runs.

    Attributes:
        instruction: which.
        times: how often.
        flops: by dtype, each time.
        bytes: from and to memory, each time.
        seconds: of the roofline, each time.
    """

    instruction: Instruction
    times: int
    flops: Mapping[str, float]
    bytes: int
    seconds: float


class Collective(NamedTuple):
    """A collective as it runs.

    Attributes:
        instruction: that begins it.
        times: how often.
        transfer: what it moves, each time.
        seconds: that it takes, each time.
        exposed: of these, seconds in which nothing else runs.
    """

    instruction: Instruction
    times: int
    transfer: Transfer
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in a run of a program.

    Attributes:
        work: the instructions that take time, without collectives.
        collectives: those.
        unknown_loops: how many loops end by what they compute.
    """

    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: int = 0

    @property
    def flops(self) -> dict[str, float]:
        """Of matrix products by the dtype that they multiply in; see `work.flops`."""
        total: collections.Counter[str] = collections.Counter()
        for each in self.work:
            total.update({dtype: each.times * count for dtype, count in each.flops.items()})
        return dict(total)

    @property
    def hbm_bytes(self) -> int:
        """From and to memory."""
        return sum(each.times * each.bytes for each in self.work)

    @property
    def roofline_seconds(self) -> float:
        """Of the instructions one after the other, without collectives."""
        return sum(each.times * each.seconds for each in self.work)

    @property
    def communication_seconds(self) -> float:
        """Of the collectives, hidden or not."""
        return sum(each.times * each.seconds for each in self.collectives)

    @property
    def exposed_seconds(self) -> float:
        """In which a collective has nothing to hide behind."""
        return sum(each.times * each.exposed for each in self.collectives)

    @property
    def seconds(self) -> float:
        """The least that a run takes."""
        return self.roofline_seconds + self.exposed_seconds

    @property
    def collective_bytes(self) -> dict[str, int]:
        """What collectives move, by kind; see `Transfer.bytes`."""
        total: collections.Counter[str] = collections.Counter()
        for each in self.collectives:
            total[each.transfer.kind] += each.times * each.transfer.bytes
        return dict(total)

    @property
    def calls(self) -> dict[str, int]:
        """How often library routines are called, by their target."""
        total: collections.Counter[str] = collections.Counter()
        for each in self.work:
            if each.instruction.opcode == "custom-call":
                total[each.instruction.target] += each.times
        return dict(total)

    @property
    def fusions(self) -> dict[str, int]:
        """How often fusions run, by the kind of kernel that XLA makes of them."""
        total: collections.Counter[str] = collections.Counter()
        for each in self.work:
            if each.instruction.opcode == "fusion":
                total[_fusion_kind(each.instruction)] += each.times
        return dict(total)

    def longest(self, count: int) -> list[Work]:
        """The instructions that take most of the roofline time."""
        return sorted(self.work, key=lambda each: -each.times * each.seconds)[:count]


def _fusion_kind(fusion: Instruction) -> str:
    backend = re.search(r'"fusion_backend_config":\{"kind":"(\w+)"', fusion.attributes)
    return backend[1] if backend else re.search(r"kind=(\w+)", fusion.attributes)[1]


def cost(module: Module, card: Card, *, devices: int = 1, trips: int = 1) -> Cost:
    """What a program takes.

    Args:
        module: the program.
        card: that it runs on.
        devices: how many.
        trips: of loops that end by what they compute, such as those over the tokens of a text.
    """
    return _Reader(module, card, devices, trips).passed(module.entry)[1]


class _Reader(NamedTuple):
    module: Module
    card: Card
    devices: int
    trips: int

    def passed(self, name: str) -> tuple[float, Cost]:
        """(seconds, what is done) of running a computation once."""
        computation = self.module.computations[name]
        now = free = 0.0  # when the instruction begins; when the collectives that have begun are over
        running: dict[str, tuple[int, float]] = {}  # of a collective: its place below, when it is over
        work: list[Work] = []
        collectives: list[Collective] = []
        unknown = 0
        for each in computation.values():
            if each.opcode in _FREE or each.opcode.endswith("-update"):
                continue
            if each.opcode.endswith("-done"):
                if each.operands[0] in running:
                    place, over = running.pop(each.operands[0])
                    exposed = max(0.0, over - now)
                    now += exposed
                    collectives[place] = collectives[place]._replace(exposed=exposed)
                continue
            if each.opcode in ("while", "call", "conditional"):
                seconds, inner = self._called(each)
                now += seconds
                work += inner.work
                collectives += inner.collectives
                unknown += inner.unknown_loops
                continue
            around, begun = computation, each
            if each.opcode == "async-start":
                around = self.module.computations[each.called("calls")[0]]
                begun = around.root
            if moved := transfer(around, begun, self.devices):
                seconds = moved.seconds(self.card)
                free = max(now, free) + seconds
                if each.opcode.endswith("-start") and '"is_sync":true' not in each.attributes:
                    running[each.name] = len(collectives), free
                    collectives.append(Collective(begun, 1, moved, seconds, 0.0))
                else:
                    collectives.append(Collective(begun, 1, moved, seconds, free - now))
                    now = free
            else:
                counted = flops(self.module, around, begun)
                num_bytes = hbm_bytes(self.module, around, begun)
                seconds = self.card.seconds(counted, num_bytes)
                now += seconds
                work.append(Work(begun, 1, counted, num_bytes, seconds))
        return now, Cost(tuple(work), tuple(collectives), unknown)

    def _called(self, instruction: Instruction) -> tuple[float, Cost]:
        if instruction.opcode == "call":
            return self.passed(instruction.called("to_apply")[0])
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations") or [
                *instruction.called("true_computation"),
                *instruction.called("false_computation"),
            ]
            chosen = min if f"/{SELDOM}/" in instruction.attributes else max
            return chosen(map(self.passed, branches), key=lambda passed: passed[0])
        seconds, inner = self.passed(instruction.called("body")[0])
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
        times = int(known[1]) if known else self.trips
        repeated = Cost(
            tuple(each._replace(times=times * each.times) for each in inner.work),
            tuple(each._replace(times=times * each.times) for each in inner.collectives),
            inner.unknown_loops + (not known),
        )
        return times * seconds, repeated
