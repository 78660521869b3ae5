"""Hugging Face checkpoints in and out, tensor by tensor, straight between safetensors files and the mesh.

In a checkpoint a weight is [out, in] and every layer has tensors of its own; here kernels are [in, out] and layers are
stacked. Transposing, stacking and casting happen on the devices, so the host holds one tensor of one layer at a time.
"""

import dataclasses
import functools
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree
from safetensors import safe_open

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.files import replace_json
from dataflex_jax.foreign import read_object
from dataflex_jax.models import layout
from dataflex_jax.models.checks import shown
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.models.hf.config import to_hf
from dataflex_jax.models.hf.folders import CONFIG, local_folder, make_empty
from dataflex_jax.models.hf.tensors import DTYPES, INDEX, WEIGHTS, Stored, check_dtype, stored_tensors

logger = logging.getLogger(__name__)

WEIGHT_FILES = (CONFIG, "model*.safetensors", INDEX)
MAX_SHARD_BYTES = 5_000_000_000

_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_HEAD = layout.row("lm_head/kernel").hf
_ANY_HEAD = re.compile(r"(lm_head|score)\.")  # predicts tokens, classifies


class HFTensor(NamedTuple):
    """A tensor of a checkpoint: a parameter, or one of those that are stacked in it.

    Attributes:
        name: in the checkpoint.
        shape: there.
        param: the parameter, an array or a `jax.ShapeDtypeStruct`.
        index: on the parameter's leading axes: of a block's the layer; () where it is not stacked.
        transposed: whether it is [out, in] there and [in, out] here.
    """

    name: str
    shape: tuple[int, ...]
    param: Any
    index: tuple[int, ...]
    transposed: bool

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def value(self, dtype: jnp.dtype | None = None) -> Array:
        """The tensor as the checkpoint has it, on the devices of `param`; None keeps its dtype."""
        dtype = self.param.dtype if dtype is None else jnp.dtype(dtype)
        return _as_in_file(self.param, self.index, self.transposed, dtype)


def hf_tensors(params: PyTree) -> list[HFTensor]:
    """Every tensor of the checkpoint that holds `params` (arrays or shapes), layer by layer."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = [tensor for path, leaf in leaves for tensor in _tensors_of(path, leaf)]
    return sorted(tensors, key=lambda tensor: tensor.index[:1] or (-1,))


def load_params(
    name_or_path: str,
    abstract: PyTree,
    option: str = "model.name_or_path",
    *,
    part: bool = False,
    head: bool = True,
) -> PyTree[Array]:
    """The weights of a checkpoint as parameters of a `decoder`, each read straight to its shards.

    Every process reads only the slices that its devices hold. The peak on the host is one tensor of one layer; on the
    devices, the parameters and one tensor.

    Args:
        name_or_path: a folder or a hub id, with model.safetensors or model.safetensors.index.json and its shards.
        abstract: the shapes, dtypes and shardings of the parameters (`layout.placed`); whatever float dtype the
            checkpoint has is cast to theirs.
        option: what the user set to `name_or_path`, for messages.
        part: `abstract` is a part of the model; what else the checkpoint holds is passed over.
        head: False: a head in the checkpoint is passed over.

    Raises:
        InputError: no such checkpoint; a file that is missing or cut short; a tensor that is missing, of another shape,
            or no part of the model; a separate output head where the model ties it to the embedding.
    """
    folder = local_folder(name_or_path, WEIGHT_FILES, option)
    stored = stored_tensors(folder)
    if not head:
        stored = {name: tensor for name, tensor in stored.items() if not _ANY_HEAD.match(name)}
    needed, tied = hf_tensors(abstract), not part and "lm_head" not in abstract
    _check_needed(folder, stored, needed)
    if not part:
        _check_all_used(stored, needed, tied)
    logger.info("Reading %d tensors of %s.", len(stored), name_or_path)

    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _load(stored, _tensors_of(path, leaf)), abstract)
    if tied and _HEAD in stored:
        _check_tied(stored[_HEAD], params["embed_tokens"]["embedding"])
    return params


def save_pretrained(
    folder: str | Path,
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer_folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that `transformers` and `load_params` read: config.json, safetensors, tokenizer files.

    In a run of several processes every one of them calls it, and the first writes. The peak on the host is one tensor.
    config.json comes last, so what a killed export leaves is not taken for a model.

    Args:
        folder: a new or empty folder.
        config: of the model.
        params: of the model, on the mesh.
        tokenizer_folder: its files are copied.
        dtype: of the tensors written, "float32" or "bfloat16"; None: config.param_dtype.
        max_shard_bytes: a single file up to this size, beyond it shards of at most this size and an index.

    Raises:
        InputError: the folder has files in it or cannot be made; no tokenizer; an unknown dtype.
        TrainingError: the files cannot be written.
    """
    folder, tokenizer_folder = Path(folder), Path(tokenizer_folder)
    config = dataclasses.replace(config, param_dtype=dtype or config.param_dtype)
    dtype = jnp.dtype(config.param_dtype)
    shards = _shards(hf_tensors(params), dtype.itemsize, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WEIGHTS] if len(shards) == 1 else names
    main = jax.process_index() == 0
    if main:
        contents = to_hf(config) | _special_tokens(tokenizer_folder)
        make_empty(folder)
    try:
        for name, tensors in zip(names, shards, strict=True):
            _write_shard(folder / name, tensors, dtype)
        if not main:
            return
        if len(shards) > 1:
            files = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
            size = sum(tensor.size for tensors in shards for tensor in tensors) * dtype.itemsize
            replace_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files}, indent=2)
        for file in tokenizer_folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        replace_json(folder / CONFIG, contents, indent=2)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror}); what is there is incomplete") from error


# Names and shapes.


def _tensors_of(path, leaf) -> list[HFTensor]:
    row = layout.row(path)
    shape = leaf.shape[row.stacked :][:: -1 if row.transposed else 1]
    return [
        HFTensor(row.hf.format(*index), shape, leaf, index, row.transposed)
        for index in np.ndindex(*leaf.shape[: row.stacked])
    ]


# Reading.


def _check_needed(folder: Path, stored: dict[str, Stored], needed: list[HFTensor]) -> None:
    for tensor in needed:
        found = stored.get(tensor.name)
        if found is None:
            file = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
            raise InputError(f"{file}: has no tensor {tensor.name!r}, which the configured model needs")
        if found.shape != tensor.shape:
            raise InputError(
                f"{found.file}: tensor {tensor.name!r} has shape {list(found.shape)}; the configured model needs "
                f"{list(tensor.shape)}"
            )
        check_dtype(found)


def _check_all_used(stored: dict[str, Stored], needed: list[HFTensor], tied: bool) -> None:
    known = {tensor.name for tensor in needed} | ({_HEAD} if tied else set())
    for name, found in stored.items():
        if name not in known and not _COMPUTED.search(name):
            raise InputError(f"{found.file}: tensor {shown(found.name)} is no part of the configured model")


def _load(stored: dict[str, Stored], tensors: list[HFTensor]) -> Array:
    """The parameter that `tensors`, one or all that are stacked, are in the checkpoint."""
    _, _, param, index, transposed = tensors[0]
    axes = (*param.sharding.spec, *(None,) * (param.ndim - len(param.sharding.spec)))
    sharding = NamedSharding(param.sharding.mesh, P(*axes[len(index) :][:: -1 if transposed else 1]))
    if not index:
        return _as_param(read_tensor(stored[tensors[0].name], sharding), transposed, param.dtype, param.sharding)
    stacked = jnp.zeros(param.shape, param.dtype, device=param.sharding)
    for tensor in tensors:
        stacked = _with(stacked, read_tensor(stored[tensor.name], sharding), tensor.index, transposed, param.sharding)
        jax.block_until_ready(stacked)  # or the host would run ahead and hold the tensors of many layers
    return stacked


def read_tensor(stored: Stored, sharding: Sharding) -> Array:
    """The tensor as it is in the file. The file is not kept open: pages that were read would stay in memory with it."""
    parts = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((along.start, along.stop) for along in index)  # Python 3.11 cannot hash slices
        if key not in parts:
            parts[key] = tensor[index]
        return parts[key]

    with safe_open(stored.file, framework="numpy") as opened:
        tensor = opened.get_slice(stored.name)
        return jax.make_array_from_callback(stored.shape, sharding, part, DTYPES[stored.dtype])


def _check_tied(head: Stored, embedding: Array) -> None:
    check_dtype(head)
    same = head.shape == embedding.shape and jnp.array_equal(
        read_tensor(head, embedding.sharding).astype(embedding.dtype), embedding
    )
    if not same:
        raise InputError(
            f"{head.file}: tensor {_HEAD!r} differs from the embedding, to which {CONFIG} ties it; set its "
            "tie_word_embeddings to false to keep both"
        )


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "sharding"))
def _as_param(tensor, transposed, dtype, sharding):
    return jax.lax.with_sharding_constraint((tensor.T if transposed else tensor).astype(dtype), sharding)


@functools.partial(jax.jit, static_argnames=("transposed", "sharding"), donate_argnums=0)
def _with(stacked, tensor, index, transposed, sharding):
    tensor = (tensor.T if transposed else tensor).astype(stacked.dtype)
    start = (*index, *(0,) * tensor.ndim)
    tensor = tensor.reshape((1,) * len(index) + tensor.shape)
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_slice(stacked, tensor, start), sharding)


# Writing.


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _as_in_file(tensor, index, transposed, dtype):
    for i in index:
        tensor = jax.lax.dynamic_index_in_dim(tensor, i, axis=0, keepdims=False)
    return (tensor.T if transposed else tensor).astype(dtype)


def _shards(tensors: list[HFTensor], itemsize: int, max_bytes: int) -> list[list[HFTensor]]:
    """The tensors in order, in groups of at most `max_bytes`, or of one tensor."""
    shards, room = [], 0
    for tensor in tensors:
        size = tensor.size * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_shard(path: Path, tensors: list[HFTensor], dtype: jnp.dtype) -> None:
    """One safetensors file. The library's own writer wants all its tensors in memory."""
    if jax.process_index() != 0:
        for tensor in tensors:
            _on_host(tensor, dtype)
        return
    (code,) = (code for code, known in DTYPES.items() if known == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.size * dtype.itemsize
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(_on_host(tensor, dtype)).view(np.uint8).data)


def _on_host(tensor: HFTensor, dtype: jnp.dtype) -> np.ndarray:
    """The whole tensor; every process must take part."""
    return multihost_utils.process_allgather(tensor.value(dtype), tiled=True)


def _special_tokens(tokenizer_folder: Path) -> dict[str, int | None]:
    """The fields of config.json that say where a text begins and ends; some families' defaults are other tokens."""
    path = tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the tokenizer is exported with the model")
    backend = tokenizers.Tokenizer.from_file(str(path))
    declared = read_object(tokenizer_folder / "tokenizer_config.json")
    ids = {}
    for kind in ("bos", "eos"):
        token = declared.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        ids[f"{kind}_token_id"] = None if token is None else backend.token_to_id(token)
    return ids
