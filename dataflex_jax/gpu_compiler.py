"""What XLA's GPU compiler is told where the user has not said it: before JAX starts, and only where it will use a GPU.

By default each layer's gradients leave in one collective that nothing hides. docs/scaling.md has the figures.
"""

import importlib.metadata
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

LEVEL = "O1"  # collectives run beside the layer before or after
# Bytes up to which neighbouring collectives become one: more than the weights of a layer (0.44 GB for 8B in bfloat16).
FLAGS = {
    "--xla_gpu_all_gather_combine_threshold_bytes": str(2**29),
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**29),
}
# Where layers are written out: neighbours are of other layers there, and one would wait for the other. And cuBLAS adds
# the residual stream to its products, which XLA's own kernels leave to another pass.
WRITTEN_OUT = {
    "--xla_gpu_enable_triton_gemm": False,
    "--xla_gpu_all_gather_combine_threshold_bytes": str(2**25),
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**22),
}
_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last is that of Windows


def tell() -> None:
    """Sets JAX_OPTIMIZATION_LEVEL and XLA_FLAGS, of this process and of those that it starts, and says so.

    What they say already stays, also the flags that are in XLA_FLAGS; so does what was set by `jax.config`.
    """
    if not _will_be_used():
        return
    told, (level, flags) = [], unsaid()
    if level is not None:
        os.environ["JAX_OPTIMIZATION_LEVEL"] = level
        jax.config.update("jax_optimization_level", level)  # JAX has read the variable already
        told.append(f"JAX_OPTIMIZATION_LEVEL={level}")
    if flags:
        ours = " ".join(f"{name}={value}" for name, value in flags.items())
        os.environ["XLA_FLAGS"] = f"{ours} {os.environ.get('XLA_FLAGS', '')}".strip()
        told.append(f"XLA_FLAGS={ours}")
    if told:
        logger.info("For the GPU's compiler, where not set already: %s", ", ".join(told))


def unsaid() -> tuple[str | None, dict[str, str]]:
    """The level and the flags that the user has not set: JAX_OPTIMIZATION_LEVEL's value, or None, and XLA's flags."""
    level_is_set = "JAX_OPTIMIZATION_LEVEL" in os.environ or jax.config.jax_optimization_level != "UNKNOWN"
    return None if level_is_set else LEVEL, _not_in(os.environ.get("XLA_FLAGS", "").split(), FLAGS)


def options(scan_layers: bool) -> dict[str, str | bool]:
    """For `jax.jit` of a program, where its devices are GPUs: what it is compiled with beside what `tell` has said.

    Args:
        scan_layers: of the model.
    """
    if scan_layers:
        return {}
    told = {f"{name}={value}" for name, value in FLAGS.items()}
    theirs = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in told]
    return {name.removeprefix("--"): value for name, value in _not_in(theirs, WRITTEN_OUT).items()}


def _not_in(theirs: list[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are not among theirs."""
    if not all(flag.startswith("--") for flag in theirs):  # it may be the name of a file with flags
        return {}
    named = {flag.partition("=")[0] for flag in theirs}
    return {name: value for name, value in flags.items() if name not in named}


def _will_be_used() -> bool:
    """Whether JAX will start on NVIDIA GPUs: one is here, its plugin too, and nothing names other platforms."""
    platforms = jax.config.jax_platforms
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    plugins = (entry.name for entry in importlib.metadata.entry_points(group="jax_plugins"))
    return any(name.startswith("xla_cuda") for name in plugins) and any(Path(device).exists() for device in _DEVICES)
