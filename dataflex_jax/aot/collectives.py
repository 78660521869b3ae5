"""Collectives of a compiled program: what each moves between which devices, and how long that takes at least."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dataflex_jax.aot.cards import CARDS_PER_HOST, Card
from dataflex_jax.aot.hlo import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Transfer(NamedTuple):
    """One collective.

    Attributes:
        kind: of `KINDS`.
        by_dtype: bytes of the whole by the arrays' dtypes: what a gather gives, what a reduction or an exchange is
            given, on one device.
        group: the devices that take part, of the first of equal groups.
    """

    kind: str
    by_dtype: Mapping[str, int]
    group: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the whole."""
        return sum(self.by_dtype.values())

    def seconds(self, card: Card) -> float:
        """The least time on these cards, as a ring takes it."""
        size = len(self.group)
        if size == 1:
            return 0.0
        hosts = {device // CARDS_PER_HOST for device in self.group}
        rate, latency = card.within_host, card.latency
        if len(hosts) > 1:
            # As many cards of the group as a host has share its way out.
            rate, latency = min(rate, card.between_hosts * size / len(hosts)), card.latency_between_hosts
        if self.kind in ("collective-permute", "collective-broadcast"):
            moved = self.bytes
        else:
            moved = self.bytes * (size - 1) / size * (2 if self.kind == "all-reduce" else 1)
        return latency + moved / rate


def transfer(computation: Computation, instruction: Instruction, devices: int) -> Transfer | None:
    """The collective that an instruction is or begins; None where it is none.

    Args:
        computation: that the instruction is in.
        instruction: any but one that ends a collective.
        devices: of the program.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    whole = [array for name in instruction.operands for array in computation[name].arrays]
    if kind == "all-gather":
        # What begins one has its operands among the results, before what it gives.
        whole = instruction.arrays[len(whole) if instruction.opcode.endswith("-start") else 0 :]
    by_dtype: collections.Counter[str] = collections.Counter()
    for array in whole:
        by_dtype[array.dtype] += array.bytes
    return Transfer(kind, dict(by_dtype), first_group(instruction.attributes, devices))


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The numbers of the devices of a collective's first group, however it is written.

    Args:
        attributes: of the instruction.
        devices: of the program.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(sorted({int(pairs[1]), int(pairs[2])}))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(number) for number in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(number) for number in iota[2].split(",")]
        order = [int(axis) for axis in iota[3].split(",")] if iota[3] else list(range(len(dims)))
        return _numbers(dims, order, int(iota[1]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return _of_mesh(sizes, mesh[2])
    return tuple(range(devices))


def _of_mesh(sizes: dict[str, int], axes: str) -> tuple[int, ...]:
    """The group along some axes of a mesh, of which a part may be meant: 'axis':(4)2 has 2 after the first 4."""
    dims, chosen = [], []
    wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in re.findall(_AXIS, axes)}
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        part = part or size
        if name in wanted:
            chosen.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    rest = [axis for axis in range(len(dims)) if axis not in chosen]
    return _numbers(dims, rest + chosen, math.prod(dims[axis] for axis in chosen))


_AXIS = r"'(\w+)'(?::\((\d+)\)(\d+))?"


def _numbers(dims: Sequence[int], order: Sequence[int], count: int) -> tuple[int, ...]:
    """The first `count` numbers of arange over `dims`, its axes in another order."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    found = []
    for place in range(count):
        number = 0
        for axis in reversed(order):
            place, index = divmod(place, dims[axis])
            number += index * strides[axis]
        found.append(number)
    return tuple(found)
