"""A compiled program's text as instructions: XLA's HLO after all passes, in the order in which a device runs it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of a number; of types below a byte XLA packs none here.
_SIZES = {
    **dict.fromkeys(("pred", "s4", "u4", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    "c128": 16,
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """The type of an array.

    Attributes:
        dtype: as XLA writes it, such as "bf16".
        dims: its dimensions.
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What they take; 0 of tokens, which hold none."""
        return self.numbers * _SIZES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: unique in the module.
        arrays: of its result, those of a tuple in their order.
        opcode: as "fusion" or "all-gather-start".
        operands: the names of the instructions it reads.
        inside: the text between its parentheses, such as a parameter's number.
        attributes: the text after them.
        is_root: whether its result is the computation's.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """What JAX called it: the path of transformations and primitives."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names, such as "calls", "body" or "branch_computations"."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
        return [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")] if found else []

    def numbers(self, attribute: str) -> list[int]:
        """The numbers of an attribute such as lhs_contracting_dims={1,2}."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(number) for number in found[1].split(",") if number] if found else []


class Computation(dict[str, Instruction]):
    """The instructions by name, in the order in which they run."""

    @property
    def root(self) -> Instruction:
        """The last one, whose result is the computation's."""
        return next(instruction for instruction in self.values() if instruction.is_root)


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: by name.
        entry: the name of the first that runs.
    """

    computations: dict[str, Computation]
    entry: str

    def arrays(self) -> Iterator[Array]:
        """The arrays of all results, those inside fusions, which are never in memory, too."""
        for computation in self.computations.values():
            for instruction in computation.values():
                yield from instruction.arrays


def parse(text: str) -> Module:
    """The module that `jax.stages.Compiled.as_text` shows.

    Raises:
        ValueError: the text is no scheduled module, so the order of its instructions means nothing.
    """
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError("this is no module of a compiled program: its first line does not say is_scheduled=true")
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if line.endswith("{") and (found := _COMPUTATION.match(line)):
            current = computations[found[2]] = Computation()
            entry = found[2] if found[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], bool(found[1]), line[found.end() :])
    return Module(computations, entry)


def _instruction(name: str, is_root: bool, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    last = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : last]
    operands = tuple(_NAME.findall(inside))
    return Instruction(name, arrays_of(rest[:end]), opcode[1], operands, inside, rest[last + 1 :], is_root)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays in the text of a type, such as "(f32[2,3]{1,0}, s32[])"."""
    return tuple(Array(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(text))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
