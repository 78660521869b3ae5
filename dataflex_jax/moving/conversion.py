"""A whole file: `converted` makes a recipe of it."""

import difflib
import os
from pathlib import Path
from typing import NamedTuple

from dataflex_jax.moving import known, trainer
from dataflex_jax.moving.datasets import datasets, targets
from dataflex_jax.moving.draft import Draft, Given, Note
from dataflex_jax.moving.policies import Policies
from dataflex_jax.moving.yaml_files import read_yaml


class Converted(NamedTuple):
    """What came of a file: the recipe, and what is to be known of the fields, in their order in it and in others."""

    text: str
    notes: tuple[Note, ...]


def converted(path: str | os.PathLike[str], name: str | None = None, devices: int | None = None) -> Converted:
    """The recipe that does what a YAML file of LLaMA-Factory or DataFlex says.

    Args:
        path: of the file.
        name: of the recipe's file; None: the same with another ending.
        devices: how many there were, each of which has its own rows of a batch; None: what the file says, or one.

    Raises:
        InputError: what cannot be read, is not known, or would give other results without a word; names file and line.
    """
    given, draft = Given(read_yaml(path)), Draft(os.fspath(path))
    stage = trainer.purpose(given)
    _refuse_left(given)
    trainer.model(given, draft)
    trainer.method(given, draft)
    policies = Policies(given, draft, datasets(given, draft, stage))
    train_step = policies.decide()
    targets(given, draft, policies.comparing)
    trainer.batch(given, draft, devices)
    trainer.duration(given, draft, train_step)
    trainer.optimizer(given, draft)
    trainer.cadence(given, draft)
    for field, reason in known.by_name(known.WITHOUT_EFFECT).items():
        if given.has(field) and field in given.left():
            draft.note(given.place(field), reason, matters=False)
    notes = sorted(draft.notes, key=lambda note: (note.place.path != draft.source, note.place))
    return Converted(draft.text(name or f"{Path(path).stem}.py"), tuple(notes))


def _refuse_left(given: Given) -> None:
    """Refuses what no recipe can do, and what nobody knows."""
    refused, without = known.by_name(known.REFUSED), known.by_name(known.WITHOUT_EFFECT)
    everything = {*refused, *without, *known.READ.split()}
    for field in given.left():
        if field in refused and given.raw(field) not in known.OFF:
            given.refuse(field, refused[field])
    for field in given.left():
        if field not in everything:
            near = difflib.get_close_matches(field, everything, 1)
            given.refuse(field, f"no field of LLaMA-Factory or DataFlex{f'; did you mean {near[0]}?' if near else ''}")
