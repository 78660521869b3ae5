"""Domain weights as a file that people read and edit: what a DoReMi proxy writes and other runs sample with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import replace_json
from dataflex_jax.foreign import parse_json
from dataflex_jax.policies.proportions import normalised

WEIGHTS_FILE = "domain_weights.json"  # in a run folder
FIELDS = ("proportions", "initial_proportions", "sampling", "prior")


def write_weights(
    path: str | os.PathLike, names: Sequence[str], weights: Float[np.ndarray, " K"], **facts: Any
) -> None:
    """Writes `{"domains": {name: weight}, ...}` as JSON; there is never half a file of that name.

    Args:
        path: of the file; its folder is made.
        names: of the domains.
        weights: one a domain, of any scale; written as a distribution.
        **facts: further entries, such as where the weights come from.

    Raises:
        InputError: weights that are no distribution.
    """
    path = Path(path)
    shares = _shares(path, np.asarray(weights, np.float64).tolist(), len(names))
    domains = dict(zip(names, shares.tolist(), strict=True))
    replace_json(path, {"domains": domains, **facts}, indent=2, ensure_ascii=False)


def with_weights_files(config: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """The configuration with numbers in place of weights files (`FIELDS` that end in .json).

    Args:
        config: the whole configuration.
        names: of the domains.

    Raises:
        InputError: see `read_weights`.
    """
    config = config.copy_and_resolve_references()
    for section in filter(None, (config.data, config.mixer)):
        for field in FIELDS:
            value = section.get(field)
            if isinstance(value, str) and value.endswith(".json"):
                with section.ignore_type():
                    section[field] = read_weights(value, names)
    return config


def read_weights(path: str | os.PathLike, names: Sequence[str]) -> tuple[float, ...]:
    """The proportions that a weights file gives to the domains `names`, in this order, as a distribution.

    Args:
        path: of a JSON file with an object "domains" from names to weights of any scale; other entries are ignored.
        names: of the domains of this run.

    Raises:
        InputError: no such file, not of that form, or its domains are not `names`: names missing and unexpected ones.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read the weights file: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file of domain weights: {one_line(error)}") from error
    domains = content.get("domains") if isinstance(content, dict) else None
    if not isinstance(domains, dict):
        raise InputError(f'{path}: must hold {{"domains": {{NAME: WEIGHT, ...}}}}')
    missing = [name for name in names if name not in domains]
    unexpected = [name for name in domains if name not in names]
    if missing or unexpected:
        wrong = [f"{what} {', '.join(found)}" for what, found in (("no", missing), ("unexpected", unexpected)) if found]
        raise InputError(f"{path}: domains: {'; '.join(wrong)} (the domains of this run are {', '.join(names)})")
    for name, weight in domains.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InputError(f"{path}: domains.{name} = {weight!r}: must be a number >= 0")
    return tuple(_shares(path, [domains[name] for name in names], len(names)).tolist())


def _shares(path: str | os.PathLike, weights: Sequence[float], num_domains: int) -> Float[np.ndarray, " K"]:
    try:
        return normalised("domains", tuple(weights), num_domains)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
