"""Data-centric dynamic training of language models in JAX: policies decide what a model trains on while it trains.

`import dataflex_jax as df` is the library for notebooks and scripts; docs/library.md shows it. Commands and runs do not
need it, so its modules are imported when they are first asked for.
"""

import importlib
import sys
from typing import Any

__version__ = "0.2.0"

# As dataflex_jax.library has it. A test of membership must not import it: `from dataflex_jax import sharding` asks too.
__all__ = [
    "AdamState",
    "Alignments",
    "Batch",
    "Embeddings",
    "GateLoads",
    "GradientNorms",
    "Gradients",
    "Hooks",
    "How",
    "InputError",
    "LoraConfig",
    "Losses",
    "Mixer",
    "Model",
    "ModelConfig",
    "Opened",
    "Order",
    "Preconditioner",
    "Projection",
    "Schedule",
    "Scheduled",
    "Selector",
    "Start",
    "TrainState",
    "TrainStep",
    "Weighter",
    "alignments",
    "batch",
    "embeddings",
    "example",
    "gradients",
    "losses",
    "mixer",
    "norms",
    "open_model",
    "open_tokenizer",
    "order",
    "register_signal",
    "rows",
    "selector",
    "sweep",
    "weighter",
]

if sys.argv[:1] == ["-m"] and any(argument.startswith(f"{__name__}.") for argument in sys.orig_argv):
    # `python -m dataflex_jax.COMMAND`, which is to import JAX now: seconds in which Ctrl-C may come.
    importlib.import_module("dataflex_jax.ending").at_interrupts_while_importing()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not an import statement: every module imports this one first, and the face imports nearly all of them.
    return getattr(importlib.import_module("dataflex_jax.library"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
