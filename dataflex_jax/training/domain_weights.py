"""Domain weights as a file that people read and edit: what a DoReMi proxy writes and other runs sample with."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError, shown
from dataflex_jax.files import replace_json
from dataflex_jax.foreign import read_object
from dataflex_jax.policies import options
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
    """The configuration with a number a domain in place of weights files (`FIELDS` that end in .json) and of pairs.

    Args:
        config: the whole configuration.
        names: of the domains.

    Raises:
        InputError: see `read_weights`; pairs of other names than the domains'.
    """
    config = config.copy_and_resolve_references()
    for name, section in (("data", config.data), ("mixer", config.mixer or {})):
        for field in FIELDS:
            value = section.get(field)
            if isinstance(value, str) and value.endswith(".json"):
                numbers = read_weights(value, names)
            elif isinstance(value, tuple | list) and value and isinstance(value[0], tuple | list):
                where = f"config.{name}.{field}"
                if len(dict(value)) < len(value):
                    raise InputError(f"{where}: name each domain once")
                numbers = _in_order(where, dict(value), names)
            else:
                continue
            with section.ignore_type():
                section[field] = numbers
    return config


def read_weights(path: str | os.PathLike, names: Sequence[str]) -> tuple[float, ...]:
    """The proportions that a weights file gives to the domains `names`, in this order, as a distribution.

    Args:
        path: of a JSON file with an object "domains" from names to weights of any scale; other entries are ignored.
        names: of the domains of this run.

    Raises:
        InputError: no such file, not of that form, or its domains are not `names`: names missing and unexpected ones.
    """
    domains = read_object(path).get("domains")
    if not isinstance(domains, dict):
        raise InputError(f'{path}: must hold {{"domains": {{NAME: WEIGHT, ...}}}}')
    return _in_order(path, domains, names)


def _in_order(where: str | os.PathLike, domains: Mapping[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    missing = [name for name in names if name not in domains]
    unexpected = [name for name in domains if name not in names]
    if missing or unexpected:
        wrong = [f"{what} {', '.join(found)}" for what, found in (("no", missing), ("unexpected", unexpected)) if found]
        raise InputError(f"{where}: domains: {'; '.join(wrong)} (the domains of this run are {', '.join(names)})")
    for name, weight in domains.items():
        if not options.is_number(weight):
            raise InputError(f"{where}: domains.{name} = {shown(weight)}: must be a number >= 0")
    return tuple(_shares(where, [domains[name] for name in names], len(names)).tolist())


def _shares(path: str | os.PathLike, weights: Sequence[float], num_domains: int) -> Float[np.ndarray, " K"]:
    try:
        return normalised("domains", tuple(weights), num_domains)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
