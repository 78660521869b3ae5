"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

There a factor is [out, in] and every layer has tensors of its own; here it is [in, out] and layers are stacked. PEFT
itself is not needed.
"""

import functools
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from safetensors import safe_open
from safetensors.numpy import save

from dataflex_jax.errors import InputError, TrainingError, one_line
from dataflex_jax.files import replace_file, replace_json
from dataflex_jax.models.checks import shown
from dataflex_jax.models.config import LoraConfig, ModelConfig
from dataflex_jax.models.hf import folders
from dataflex_jax.models.hf.tensors import check_dtype, header
from dataflex_jax.models.layout import LORA_MODULES, TABLE, adapted_module, adapter, row

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# The linear layer that has a factor of that name, where numbers stand for themselves.
_MODULES = {row.hf: adapted_module(row.path) for row in TABLE if row.factor}
_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d*)(?=\.)")
# Fields that are read or checked by name, and those that leave the maths alone; all others must be unset.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights")
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
)
# The others change the base as well.
_KEEPING_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    folder: str | Path, lora: LoraConfig, adapters: PyTree, base_name: str | None, base_weights: str | None = None
) -> None:
    """Writes adapters as PEFT does, for `peft.PeftModel.from_pretrained` and `load_adapter`; the dtype stays.

    In a run of several processes every one of them calls it, and the first writes.

    Args:
        folder: a new or empty folder.
        lora: the adapters' configuration.
        adapters: as in `models.lora`, on the mesh.
        base_name: hub id or folder of the base; None where it has no name.
        base_weights: fingerprint of the base's parameters, for `load_adapter`.

    Raises:
        InputError: the folder has files in it or cannot be made.
        TrainingError: the files cannot be written.
    """
    folder = Path(folder)
    tensors, modules = {}, {}  # by module, PEFT's name of it
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        found = row(path)
        modules[adapted_module(path)] = found.hf.split(".")[-3]
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for index in np.ndindex(*whole.shape[: found.stacked]):
            tensors[found.hf.format(*index)] = np.ascontiguousarray(whole[index].T)
    if jax.process_index() != 0:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": [modules[name] for name in lora.target_modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    metadata = {"format": "pt"} | ({"base_weights": base_weights} if base_weights else {})
    folders.make_empty(folder)
    try:
        replace_file(folder / WEIGHTS, save(tensors, metadata))
        replace_json(folder / CONFIG, config, indent=2)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror}); what is there is incomplete") from error


def read_lora_config(name_or_path: str, option: str, base_dtype: str = "bfloat16") -> tuple[LoraConfig, str | None]:
    """The configuration of a PEFT adapter, and the name of its base where it says it.

    Args:
        name_or_path: a folder or a hub id.
        option: what the user set to `name_or_path`, for messages.
        base_dtype: of the frozen parameters, which PEFT does not write down.

    Raises:
        InputError: no such adapter, or one that computes something else than plain LoRA.
    """
    folder = folders.local_folder(name_or_path, (CONFIG, WEIGHTS), option)
    file = folder / CONFIG
    config = folders.read_config(folder, CONFIG)
    _check_plain(file, config)
    modules = _modules(folder / WEIGHTS)
    values = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout", 0.0)}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{file}: {name} is {shown(value)}; a number is accepted")
    with folders.naming(file):
        lora = LoraConfig(
            **values,
            use_rslora=config.get("use_rslora", False),
            target_modules=modules,
            base_dtype=base_dtype,
        )
    return lora, _base_name(file, config)


def base_name(folder: Path) -> str | None:
    """The name of an adapter's base, where it says it.

    Raises:
        InputError: its configuration cannot be read.
    """
    return _base_name(folder / CONFIG, folders.read_config(folder, CONFIG))


def _base_name(file: Path, config: dict[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    if name is None or (isinstance(name, str) and name.isprintable()):
        return name or None
    raise InputError(f"{file}: base_model_name_or_path is {shown(name)}; a folder or hub id is accepted, or null")


def load_adapter(
    name_or_path: str, model: ModelConfig, option: str, base_name: str | None = None, base_weights: str | None = None
) -> PyTree[np.ndarray]:
    """The factors of a PEFT adapter in the layout of `models.lora`, in model.param_dtype, on the host.

    Args:
        name_or_path: a folder or a hub id.
        model: the base's shape, with the adapters' configuration in `model.lora`.
        option: what the user set to `name_or_path`, for messages.
        base_name: of the base; if the adapter names another one, a warning says so.
        base_weights: fingerprint of the base; an adapter that was saved with another one is refused.

    Raises:
        InputError: no such adapter, one of another configuration, or one whose tensors do not fit the base.
    """
    found, made_for = read_lora_config(name_or_path, option, model.lora.base_dtype)
    for field in ("rank", "alpha", "use_rslora", "target_modules"):
        ours, theirs = getattr(model.lora, field), getattr(found, field)
        if ours != theirs:
            reason = f"the adapter {name_or_path} has {theirs!r}"
            raise InputError(reason, option=f"lora.{field}", value=ours)
    file = folders.local_folder(name_or_path, (CONFIG, WEIGHTS), option) / WEIGHTS
    _check_tensors(file, model)
    with safe_open(file, framework="numpy") as opened:
        _check_base(file, (opened.metadata() or {}).get("base_weights"), base_weights)
        adapters = {}
        for module in model.lora.target_modules:
            for factor in adapter(module, model.mixture).values():
                numbers = (model.num_hidden_layers, model.num_experts)[: factor.stacked]
                found = [opened.get_tensor(factor.hf.format(*index)).T for index in np.ndindex(*numbers)]
                stacked = np.stack(found).reshape(*numbers, *found[0].shape).astype(jnp.dtype(model.param_dtype))
                *parents, kind = factor.path.split("/")
                functools.reduce(lambda tree, name: tree.setdefault(name, {}), parents, adapters)[kind] = stacked
    if made_for and base_name and Path(made_for).name != Path(base_name).name:
        logger.warning("The adapter %s was made for %s; the base here is %s.", name_or_path, made_for, base_name)
    return adapters


def _check_plain(file: Path, config: dict[str, Any]) -> None:
    if fused := config.get("target_parameters"):
        raise InputError(
            f"{file}: target_parameters={shown(fused)}: adapters of parameters that hold all experts, tensors such as "
            "'...mlp.experts.lora_A.weight', are not read; merge them by PEFT (merge_and_unload), take the merged model"
        )
    accepted = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": _KEEPING_THE_BASE}
    for name, value in config.items():
        if name in accepted and value not in accepted[name]:
            raise InputError(f"{file}: {name}={shown(value)} is not supported; accepted: {accepted[name][0]!r}")
        if name not in (*_READ, *_HARMLESS) and value:
            raise InputError(f"{file}: {one_line(name, 100)}={shown(value)} is not supported; it must be unset")


def _modules(file: Path) -> tuple[str, ...]:
    """The linear layers that have tensors, by name."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; other formats of adapters are not read")
    stored, found = header(file), []
    if not stored:
        raise InputError(f"{file}: has no tensors")
    for name in stored:
        module = _MODULES.get(_NUMBER.sub("{}", name))
        if module is None:
            raise InputError(
                f"{file}: tensor {shown(name)} is no factor of a linear layer of the blocks or of one expert "
                f"({', '.join(LORA_MODULES)})"
            )
        found.append(module)
    return tuple(sorted(set(found)))


def _check_tensors(file: Path, model: ModelConfig) -> None:
    stored, needed = header(file), {}
    for module in model.lora.target_modules:
        inputs, outputs = model.adapter_widths()[module]
        shapes = {"lora_a": (model.lora.rank, inputs), "lora_b": (outputs, model.lora.rank)}
        for factor, found in adapter(module, model.mixture).items():
            numbers = (model.num_hidden_layers, model.num_experts)[: found.stacked]
            needed |= {found.hf.format(*index): shapes[factor] for index in np.ndindex(*numbers)}
    for name, shape in needed.items():
        if name not in stored:
            raise InputError(f"{file}: has no tensor {name!r}, which an adapter of this base needs")
        found = stored[name]
        if found.shape != shape:
            raise InputError(
                f"{file}: tensor {name!r} has shape {list(found.shape)}; an adapter of this base needs {list(shape)}"
            )
        check_dtype(found)
    if extra := sorted(stored.keys() - needed.keys()):
        raise InputError(
            f"{file}: tensor {shown(extra[0])} has no place in this base, which has {model.num_hidden_layers} layers"
        )


def _check_base(file: Path, theirs: str | None, ours: str | None) -> None:
    # The first word is the dtype: what is rounded to another one has another fingerprint.
    if theirs and ours and theirs.partition(" ")[0] == ours.partition(" ")[0] and theirs != ours:
        raise InputError(f"{file}: an adapter for another base ({one_line(theirs, 100)}), not for this one ({ours})")
