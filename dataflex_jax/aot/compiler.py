"""Compiles programs with XLA's GPU compiler on a machine without a GPU.

JAX's CUDA plugin (the extra "aot") has the whole compiler: the fusions, buffers, schedule and collectives are the real
ones. It cannot run a program, try out which form of a product is fastest, or ask cuDNN for its workspace.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src.config import EffortLevel
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dataflex_jax import gpu_compiler
from dataflex_jax.aot.cards import Card
from dataflex_jax.errors import InputError

_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here; None where it can."""
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, _PLUGINS)):
        return 'JAX\'s CUDA plugin is not installed: pip install -c constraints.txt -e ".[aot]"'
    if jax.config.jax_platforms != "cpu":
        # Else the plugin looks for a driver, and without one it is not there at all.
        return f"JAX_PLATFORMS must be cpu from the start of the process, not {jax.config.jax_platforms}"
    return None


def check(option: str = "--device") -> None:
    """Refuses to go on where nothing can be compiled for a GPU.

    Raises:
        InputError: says what is missing.
    """
    if reason := missing():
        raise InputError(f"{option}: {reason}")


@contextlib.contextmanager
def standing_in(card: Card) -> Iterator[None]:
    """While a program is traced and lowered: what JAX asks of cuDNN in this process is answered as this card would.

    Everything that stands in for a GPU is here; all else is asked of the mesh's devices (`sharding.program_device`).
    """

    def at_least(capability: str) -> bool:
        return card.compute_capability >= _version(capability)

    def equal(capability: str) -> bool:
        return card.compute_capability == _version(capability)

    answers = {
        "check_cudnn_version": lambda: card.cudnn,
        "check_compute_capability": at_least,
        "is_cuda_compute_capability_equal": equal,
    }
    before = {name: getattr(cudnn, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(cudnn, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(cudnn, name, function)


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def lowered(function: Any, arguments: tuple, mesh: jax.sharding.Mesh, card: Card | None = None) -> jax.stages.Lowered:
    """A program for the devices of a mesh.

    Args:
        function: from `jax.jit`, not called or lowered before.
        arguments: `jax.ShapeDtypeStruct`s with shardings.
        mesh: of the card's devices, or of those that are here.
        card: the mesh's; None: those that are here.
    """
    with jax.set_mesh(mesh), contextlib.nullcontext() if card is None else standing_in(card):
        return function.lower(*arguments)


def compiled(
    function: Any,
    arguments: tuple,
    mesh: jax.sharding.Mesh,
    card: Card | None = None,
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """`lowered`, compiled; for a card with what a run tells the compiler (`gpu_compiler`).

    Args:
        function: as there.
        arguments: as there.
        mesh: as there.
        card: as there.
        options: of XLA beside these and those of the environment, such as {"xla_gpu_enable_triton_gemm": False}.
    """
    told = {} if card is None else _as_in_a_run()
    return lowered(function, arguments, mesh, card).compile(compiler_options={**told, **(options or {})} or None)


def _as_in_a_run() -> dict[str, Any]:
    level, flags = gpu_compiler.unsaid()
    told = {name.removeprefix("--"): value for name, value in flags.items()}
    return told if level is None else told | {"optimization_level": EffortLevel(level).value}
