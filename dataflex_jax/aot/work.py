"""What one instruction asks of a device: FLOPs of its matrix products, and bytes from and to its memory.

Bytes are those of operands and results: what happens inside a fusion stays in registers and caches. Of an array that is
only sliced or gathered from, the slices count; of one that is updated in place, the update.
"""

import collections
import re
from collections.abc import Iterator, Mapping

from dataflex_jax.aot.hlo import Array, Computation, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")
# Backward, attention has five products where it has two forward.
_BACKWARD = 2.5


def flops(module: Module, computation: Computation, instruction: Instruction) -> Mapping[str, float]:
    """FLOPs of an instruction's matrix products by the dtype that they multiply in.

    Products of float32 are "tf32" unless they ask for the highest precision. Everything else an instruction computes
    counts nothing: the time of that is the memory's.

    Args:
        module: the program.
        computation: that the instruction is in.
        instruction: of the products, those in the computations that it calls included.
    """
    found: collections.Counter[str] = collections.Counter()
    if instruction.opcode == "dot":
        found[_dot_dtype(computation, instruction)] += _dot_flops(computation, instruction)
    elif instruction.opcode == "custom-call":
        found.update(_call_flops(computation, instruction))
    elif instruction.opcode in ("fusion", "call"):
        for name in instruction.called("calls") + instruction.called("to_apply"):
            inner = module.computations[name]
            for each in inner.values():
                found.update(flops(module, inner, each))
    return found


def _dot_dtype(computation: Computation, dot: Instruction) -> str:
    dtype = computation[dot.operands[0]].arrays[0].dtype
    precise = "operand_precision={highest" in dot.attributes
    return "tf32" if dtype == "f32" and not precise else dtype


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    left = computation[dot.operands[0]].arrays[0]
    depth = Array(left.dtype, tuple(left.dims[axis] for axis in dot.numbers("lhs_contracting_dims"))).numbers
    return 2.0 * dot.arrays[0].numbers * depth


def _call_flops(computation: Computation, call: Instruction) -> Mapping[str, float]:
    operands = [computation[name].arrays[0] for name in call.operands]
    if call.target.startswith("__cudnn$fmha"):
        scores = Array("", _quoted_numbers(call.attributes, '"intermediate_tensor_shape".*?"dimensions": ?'))
        head_dim = operands[0].numbers // (scores.numbers // scores.dims[-1])
        forward = 4.0 * scores.numbers * head_dim * _seen(call.attributes, scores.dims[-1])
        return {operands[0].dtype: forward * (_BACKWARD if call.target.endswith("Backward") else 1)}
    if call.target.startswith("__cublas$"):
        axes = _quoted_numbers(call.attributes, '"lhs_contracting_dimensions": ?')
        depth = Array("", tuple(operands[0].dims[axis] for axis in axes)).numbers
        dtype = "tf32" if operands[0].dtype == "f32" and '"HIGHEST"' not in call.attributes else operands[0].dtype
        return {dtype: 2.0 * call.arrays[0].numbers * depth}
    if call.target == "__gpu$xla.gpu.triton":
        return _grouped_flops(operands[2], operands[3], call.arrays[0])
    return {}


def _grouped_flops(x: Array, y: Array, result: Array) -> Mapping[str, float]:
    """Of `models.grouped`: blocks x with weights y, or with blocks y, a weight's sum of which the result has."""
    blocks, rows, inputs = x.dims
    weights = y.dims[0] if result.dims[0] == blocks else result.dims[0]
    # Half a block of each weight is not used, on average.
    return {x.dtype: 2.0 * (blocks - weights / 2) * rows * inputs * result.dims[2]}


def _seen(attributes: str, keys: int) -> float:
    """The share of all keys that a query sees under the mask of cuDNN's attention."""
    if "CAUSAL" not in re.search(r'"mask_type": ?"(\w+)"', attributes)[1]:
        return 1.0
    window = re.search(r'"sliding_window_length": ?"?(\d+)', attributes)
    window = int(window[1]) if window and int(window[1]) else keys
    window = min(window, keys)
    return (window * (window + 1) / 2 + (keys - window) * window) / keys**2


def _quoted_numbers(text: str, before: str) -> tuple[int, ...]:
    """The list of JSON after `before`, such as ["8","12"]."""
    found = re.search(before + r"\[([^\]]*)\]", text)
    return tuple(int(number) for number in re.findall(r"\d+", found[1]))


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads from and writes to a device's memory."""
    operands = [computation[name] for name in instruction.operands]
    match instruction.opcode:
        case "fusion":
            return _fusion_bytes(module.computations[instruction.called("calls")[0]], instruction)
        case "dynamic-slice" | "slice":
            return 2 * instruction.bytes
        case "gather":
            return 2 * instruction.bytes + operands[1].bytes
        case "dynamic-update-slice":
            return 2 * operands[1].bytes
        case "scatter":
            return operands[1].bytes + 2 * operands[2].bytes
        case "copy-start":
            return 2 * operands[0].bytes
    return instruction.bytes + sum(operand.bytes for operand in operands)


def _fusion_bytes(inner: Computation, fusion: Instruction) -> int:
    uses = collections.defaultdict(list)
    for user, place, parameter in _uses(inner):
        uses[parameter].append((user, place))
    read, in_place = 0, set()
    for parameter in (each for each in inner.values() if each.opcode == "parameter"):
        how = uses[parameter.name]
        if how and all(place == 0 and user.opcode in _SLICES for user, place in how):
            read += sum(user.bytes for user, _ in how)
        elif how and all(place == 0 and user.opcode in ("dynamic-update-slice", "scatter") for user, place in how):
            in_place |= {user.name for user, _ in how}
        else:
            read += parameter.bytes
    written = fusion.bytes
    for name in in_place:
        update = inner[name].operands[1 if inner[name].opcode == "dynamic-update-slice" else 2]
        changed = inner[update].bytes
        written += changed - inner[name].bytes
        read += changed if inner[name].opcode == "scatter" else 0
    return read + max(written, 0)


def _uses(inner: Computation) -> Iterator[tuple[Instruction, int, str]]:
    """(user, which of its operands, parameter) of each use of a parameter, also under another shape."""
    same = {each.name: each.name for each in inner.values() if each.opcode == "parameter"}
    for each in inner.values():
        if each.opcode == "bitcast" and each.operands[0] in same:
            same[each.name] = same[each.operands[0]]
            continue
        for place, operand in enumerate(each.operands):
            if operand in same:
                yield each, place, same[operand]
