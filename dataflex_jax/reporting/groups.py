"""Runs that are shown as one: those of a recipe over seeds."""

import difflib
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.bands import Groups
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.table import text_of
from dataflex_jax.reporting.trackers import flatten

_SEED = "seed"
_NUMBERED = re.compile(r"[-_./ ]*(seed)?[-_= ]*\d+$", re.IGNORECASE)


def flat_config(run: RunRecords) -> dict[str, Any]:
    """The resolved configuration, flat, with dots; versions and device as they stand in config.json."""
    flat = flatten(run.config)
    return {name.removeprefix("config/").replace("/", "."): value for name, value in flat.items()}


def grouped(runs: Mapping[str, RunRecords], fields: Sequence[str] = ()) -> Groups:
    """The runs as groups by name, in the order of their first runs.

    Args:
        runs: by name.
        fields: of the configuration; runs that have the same values of all of them are a group. None: runs that differ
            in nothing but the seed are.

    Raises:
        InputError: no run has such a field.
    """
    configs = {name: flat_config(run) for name, run in runs.items()}
    known = dict.fromkeys(field for config in configs.values() for field in config)
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, 3)
            hint = f"the nearest are {', '.join(near)}" if near else "fields are written as in mixer.name"
            raise InputError(f"--group-by={field}: no run has this field of the configuration; {hint}")
    if fields:
        keys: dict[str, Hashable] = {n: tuple(repr(c.get(field)) for field in fields) for n, c in configs.items()}
    else:
        keys = {name: _but_the_seed(name, runs) for name in runs}
    members: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    if fields:
        names = [_by_values(configs[of_group[0]], fields) for of_group in members.values()]
    else:
        names = _by_runs(list(members.values()))
    return {name: [runs[n] for n in of_group] for name, of_group in zip(names, members.values(), strict=True)}


def are_single(groups: Groups) -> bool:
    """Whether every group is one run."""
    return all(len(runs) == 1 for runs in groups.values())


def seed_of(run: RunRecords) -> Any:
    """A run's seed; None where config.json does not say it."""
    return flat_config(run).get(_SEED)


def by_seed(runs: Sequence[RunRecords], values: Sequence[float | None]) -> dict[Hashable, float]:
    """Values of runs by their seeds, without those that are None; where seeds do not tell the runs apart, keys that no
    other runs have."""
    seeds: list[Hashable] = [seed_of(run) for run in runs]
    if None in seeds or len(set(seeds)) < len(seeds):
        seeds = [os.fspath(run.folder) for run in runs]
    return {seed: value for seed, value in zip(seeds, values, strict=True) if value is not None}


def _but_the_seed(name: str, runs: Mapping[str, RunRecords]) -> Hashable:
    """What a run shares with those that differ from it in the seed alone; a key of its own where there are none such,
    or where the seeds do not tell them apart."""

    def without(run: RunRecords) -> Any:
        config = run.config.get("config")
        return {**config, _SEED: None} if isinstance(config, dict) else None

    own = without(runs[name])
    alike = [n for n, run in runs.items() if own is not None and without(run) == own]
    told_apart = len({repr(seed_of(runs[n])) for n in alike}) == len(alike)
    return tuple(alike) if told_apart and alike else name


def _by_values(config: Mapping[str, Any], fields: Sequence[str]) -> str:
    """A group's name by its values, of numbers and the like with the last part of the field's name."""
    values = [(field.rpartition(".")[2], config.get(field)) for field in fields]
    return ", ".join(value if isinstance(value, str) else f"{name}={text_of(value)}" for name, value in values)


def _by_runs(groups: Sequence[Sequence[str]]) -> list[str]:
    """The groups' names: what their runs' names share but for a seed's number, or else the first run's."""
    names = []
    for runs in groups:
        shared = {_NUMBERED.sub("", name) for name in runs}
        names.append(runs[0] if len(runs) == 1 or len(shared) > 1 else shared.pop())
    return [
        name if name and names.count(name) == 1 else f"{runs[0]} (of {len(runs)})"
        for name, runs in zip(names, groups, strict=True)
    ]
