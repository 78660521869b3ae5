"""Data-centric dynamic training of language models in JAX: policies decide what a model trains on while it trains.

`import dataflex_jax as df` is the library for notebooks and scripts; docs/library.md shows it. Commands and runs do not
need it, so its modules are imported when they are first asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not an import statement: every module imports this one first, and the face imports nearly all of them.
    face = importlib.import_module("dataflex_jax.library")
    if name not in face.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(face, name)


def __dir__() -> list[str]:
    face = importlib.import_module("dataflex_jax.library")
    return sorted([*globals(), *face.__all__])
