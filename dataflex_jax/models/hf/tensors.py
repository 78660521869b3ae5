"""Safetensors files that others wrote: what they hold, and which files a checkpoint consists of."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from safetensors import safe_open

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.foreign import read_object, refuse_pointer
from dataflex_jax.models.checks import shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DECODER = "model."  # before the names of the decoder's tensors in a checkpoint with a head
DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}

_CONVERT = "only safetensors are read; convert it, e.g. with save_pretrained of transformers"


class Stored(NamedTuple):
    """A tensor in a file; its dtype in safetensors' words."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def header(file: Path, purpose: str = "") -> dict[str, Stored]:
    """What a safetensors file holds, by name. Its header must agree with its size; no tensor is read.

    Args:
        file: which one.
        purpose: what it is wanted for, at the end of messages.

    Raises:
        InputError: no such file, a Git LFS pointer, or one that is cut short, damaged or something else.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file{purpose}")
    refuse_pointer(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            return {n: Stored(n, file, tuple(t.get_shape()), t.get_dtype()) for n, t in tensors.items()}
    except Exception as error:  # the library's own, and those of the system and of its header's text
        raise InputError(f"{file}: cut short or damaged ({one_line(error)}){purpose}") from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the files of a checkpoint hold, by name: of one file, or of those that an index names.

    A decoder that was saved by itself, as embedding models are, goes by the names that it has in a whole model.

    Raises:
        InputError: there is neither, or one of the files cannot be used.
    """
    stored = _stored_tensors(folder)
    if "embed_tokens.weight" not in stored:
        return stored
    return {_DECODER + name: tensor for name, tensor in stored.items()}


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    if (folder / WEIGHTS).is_file():
        return header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin*"))
        why = f"{others[0]}: {_CONVERT}" if others else "other formats of weights are not read"
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; {why}")
    places = _places(folder / INDEX)
    first = {file: name for name, file in reversed(places.items())}
    stored = {}
    for file in sorted(first):
        stored |= header(folder / file, f"; {INDEX} places tensor {shown(first[file])} there")
    for name, file in places.items():
        if name not in stored or stored[name].file != folder / file:
            raise InputError(f"{folder / file}: has no tensor {shown(name)}, which {INDEX} places there")
    return stored


def check_dtype(stored: Stored) -> None:
    """Refuses a tensor of numbers that are not read.

    Raises:
        InputError: names the file and the tensor.
    """
    if stored.dtype not in DTYPES:
        accepted = ", ".join(DTYPES)
        raise InputError(f"{stored.file}: tensor {stored.name!r} has dtype {stored.dtype}; accepted: {accepted}")


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index}: has no weight_map from tensor names to file names")
    for name, file in places.items():
        if not isinstance(file, str) or not file.isprintable() or "/" in file or "\\" in file:
            raise InputError(
                f"{index}: places tensor {shown(name)} in {shown(file)}; the name of a file in its folder is accepted"
            )
        if not file.endswith(".safetensors"):
            raise InputError(f"{index}: places tensor {shown(name)} in {shown(file)}; {_CONVERT}")
    return places
