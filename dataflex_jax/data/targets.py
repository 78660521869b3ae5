"""The target set: rows in named groups that selectors and weighters compare the training data with."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from dataflex_jax.data.domains import Domain, open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.errors import InputError


class TargetSet(NamedTuple):
    """The target set.

    Attributes:
        pool: where its rows are.
        ids: places of the M rows in the pool.
        groups: group of each, int [M].
        names: of the groups; each has at least one row.
    """

    pool: Pool
    ids: Int[np.ndarray, " M"]
    groups: Int[np.ndarray, " M"]
    names: tuple[str, ...]


def open_targets(config: ConfigDict, domains: Sequence[Domain], tokenizer: str | Path) -> TargetSet:
    """Opens what `config.targets` names.

    Args:
        config: the whole configuration.
        domains: the training data, whose held-out split is the target set where no other is named.
        tokenizer: of the training data, as a value of `config.data.tokenizer`.

    Raises:
        InputError: data that cannot be read, or a group without any row.
    """
    section = config.targets
    split = "valid"
    if section.source is not None:
        domains, split = _open(config, tokenizer), "train"
    names, groups = [], []
    for domain in domains:
        rows = getattr(domain, split)
        if rows.num_rows == 0:
            hint = (
                "raise config.data.valid_fraction or name config.targets.source" if split == "valid" else "no labels?"
            )
            raise InputError(f"group {domain.name!r} has no rows ({hint})", option="targets")
        of_rows = [domain.name] * rows.num_rows
        if section.group_field is not None:
            option = "targets.group_field"
            if not domain.store.has_records:
                raise InputError("rows of documents are no records; use domains as groups", option=option)
            try:
                of_rows = [str(value) for value in domain.store.values(split, section.group_field)]
            except InputError as error:
                raise InputError(str(error), option=option, value=section.group_field) from error
        groups += of_rows
        names += dict.fromkeys(of_rows)
    names = tuple(dict.fromkeys(names))
    numbers = np.array([names.index(name) for name in groups])
    ids = np.arange(len(numbers))
    if section.group_rows is not None:
        ids = np.sort(np.concatenate([np.flatnonzero(numbers == g)[: section.group_rows] for g in range(len(names))]))
    return TargetSet(Pool(domains, split), ids, numbers[ids], names)


def held_out(domains: Sequence[Domain], most: int) -> TargetSet:
    """The held-out rows of a run's domains, as a set whose groups the domains are.

    Args:
        domains: of the run.
        most: rows of a domain.

    Raises:
        InputError: a domain without held-out rows.
    """
    pool = Pool(domains, "valid")
    if empty := [domain.name for domain in domains if domain.valid.num_rows == 0]:
        reason = f"domain {empty[0]!r} has no held-out rows, which are needed here; raise it"
        raise InputError(reason, option="data.valid_fraction")
    ids = np.concatenate(
        [np.arange(start, min(start + most, stop)) for start, stop in itertools.pairwise(pool.offsets)]
    )
    return TargetSet(pool, ids, pool.domain_of(ids), tuple(domain.name for domain in domains))


def _open(config: ConfigDict, tokenizer: str | Path) -> Sequence[Domain]:
    data = config.data.copy_and_resolve_references()
    names = [name for name in config.targets if name not in ("group_field", "group_rows")]
    for name in names:
        data[name] = config.targets[name]
    data.update(tokenizer=str(tokenizer), valid_fraction=0.0, packing=False, max_samples=None)
    try:
        return open_domains(data)[0]
    except InputError as error:
        # What reads the data knows its options by the names that the training data's have.
        section, _, name = (error.option or "").partition(".")
        if section == "data" and name in names:
            raise error.renamed(f"targets.{name}") from error
        raise InputError(str(error), option="targets") from error
