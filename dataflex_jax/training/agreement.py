"""The processes of a run compare what they are about to do, before one of them trains on something else than the rest.

Each comparison has all processes raise the same error, which names the first thing that differs and who has what.
"""

import collections
import hashlib
import json
import os
import secrets
import sys
import time
import types
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import dataflex_jax
from dataflex_jax.errors import InputError
from dataflex_jax.models.hf import folders
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.locate import run_at

_OWN = ("config.data.cache_dir",)  # may lie elsewhere on every host; what is in it is compared
_OF_JAX = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl", "jax_default_matmul_precision")
_SHOWN = 80  # characters of a value
_SECONDS = 10.0  # until other hosts see a new file on a shared file system
_SAMPLE = 1 << 16  # bytes at the beginning and at the end of a file of weights


def agree(values: Mapping[str, Any]) -> None:
    """Compares values of all processes, which must call it in the same order.

    Args:
        values: what this process has, by a name for messages; JSON values.

    Raises:
        InputError: on all processes; names the first value that differs.
    """
    if jax.process_count() > 1 and (fault := difference(_gathered(values))):
        raise InputError(fault)


def difference(values: Sequence[Mapping[str, Any]]) -> str | None:
    """The first thing that processes do not agree about, in words, or None.

    Args:
        values: of each process, by name.
    """
    for name in dict.fromkeys(name for each in values for name in each):
        by_value = collections.defaultdict(list)
        for process, each in enumerate(values):
            shown = json.dumps(each[name], sort_keys=True) if name in each else "nothing"
            by_value[shown].append(process)
        if len(by_value) > 1:
            groups = "; ".join(f"{_shortened(value)} ({_named(who)})" for value, who in by_value.items())
            return f"{name} is not the same in all processes: {groups}; start all of them with the same"
    return None


def agree_on_configuration(config: ConfigDict) -> None:
    """Compares what needs nothing but the configuration: the code, the devices of each process, every field.

    Raises:
        InputError: on all processes; names the first that differs.
    """
    if jax.process_count() == 1:
        return
    devices = collections.Counter(device.process_index for device in jax.devices())
    if fault := difference([{"the number of devices": devices[i]} for i in range(jax.process_count())]):
        raise InputError(fault)
    packages = ("jax", "jaxlib", "numpy", "orbax-checkpoint")
    agree(
        {f"the version of {name}": metadata.version(name) for name in packages}
        | {"the version of dataflex_jax": dataflex_jax.__version__, "the code of dataflex_jax": _code(dataflex_jax)}
        | {name: getattr(jax.config, name) for name in _OF_JAX}
    )
    fields = flattened(config.copy_and_resolve_references().to_dict(), "config")
    agree({name: value for name, value in fields.items() if name not in _OWN})


def agree_on_run_folder(folder: Path) -> None:
    """Has all processes see a file that process 0 makes in the run folder, for as long as this takes.

    Raises:
        InputError: on all processes; the folder is not the same one everywhere.
    """
    if jax.process_count() == 1:
        return
    made = _made(folder) if jax.process_index() == 0 else None
    first = _gathered({"folder": str(folder), "made": made})[0]
    if first["made"] is None:
        return  # process 0 says why it cannot, where it opens the folder
    sees = [each["sees"] for each in _gathered({"sees": _appears(folder, first["made"])})]
    if made is not None:
        (folder / made).unlink(missing_ok=True)
    if blind := [process for process, saw in enumerate(sees) if not saw]:
        raise InputError(
            f"--workdir={first['folder']}: {_named(blind)} cannot see what process 0 writes there; all need the same "
            "folder, on a file system that their hosts share"
        )


def plugins(config: ConfigDict) -> dict[str, str]:
    """What tells the source of the plugins, which are imported, from others; for `agree`."""
    return {f"the code of plugin {name!r}": _code(sys.modules[name]) for name in config.plugins}


def weights(config: ConfigDict) -> dict[str, str]:
    """What tells the files of imported weights from others: names, sizes, beginnings and ends; for `agree`."""
    sources = {"model.name_or_path": None if config.model.from_scratch else config.model.name_or_path}
    sources["lora.name_or_path"] = config.lora.name_or_path
    return {f"what is in config.{field}": _files(source, field) for field, source in sources.items() if source}


def flattened(value: Any, name: str) -> dict[str, Any]:
    """Nested mappings as one, from dotted names to JSON values."""
    if not isinstance(value, Mapping):
        return {name: value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)}
    return {key: each for field, inner in value.items() for key, each in flattened(inner, f"{name}.{field}").items()}


def _gathered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values of every process."""
    own = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _named(processes: Sequence[int]) -> str:
    listed = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {listed}"


def _code(module: types.ModuleType) -> str:
    """What tells a module's source from others; a package's with all that is in it."""
    digest = hashlib.blake2b(digest_size=8)
    if module.__file__ is not None:
        path = Path(module.__file__)
        for each in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            digest.update(f"{each.relative_to(path.parent)}\n".encode() + each.read_bytes())
    return digest.hexdigest()


def _made(folder: Path) -> str | None:
    name = f".{secrets.token_hex(8)}.seen"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None
    return name


def _appears(folder: Path, name: str) -> bool:
    end = time.monotonic() + _SECONDS
    while True:
        # Listed: a network file system may remember for a while that there was no such file.
        if folder.is_dir() and name in os.listdir(folder):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _files(source: str, option: str) -> str:
    run = run_at(source, option)
    if run is not None:
        folder, patterns = run.folder / FOLDER / str(run.step), ["*"]
    else:
        folder, patterns = folders.local_folder(source, [folders.CONFIG], option), ["*.safetensors", "*.json"]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
