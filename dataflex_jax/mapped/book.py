"""What a folder knows of its models: which they are, and the losses of those that are done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError, shown
from dataflex_jax.files import read_sealed, replace_sealed
from dataflex_jax.mapped.members import Member
from dataflex_jax.training import changes
from dataflex_jax.training.assembly import Experiment

FILE = "models.json"
# Fields that change no model and nothing that is measured of it; the mesh is all devices along "data" in any case.
_WITHOUT_EFFECT = ("log_every", "eval_every", "eval_rows", "evaluators", "checkpoint_every", "keep", "tensorboard")
_WITHOUT_EFFECT += ("wandb_project", "data.cache_dir", "data.verify", "sweep", "mesh", "selector", "order")


def identity(experiment: Experiment, targets: TargetSet) -> dict[str, Any]:
    """What models and measurements must agree with that are kept together, by name."""
    fields = changes.flat(experiment.config.to_dict())
    kept = {
        f"config.{name}": value
        for name, value in fields.items()
        if name not in _WITHOUT_EFFECT and name.partition(".")[0] not in _WITHOUT_EFFECT
    }
    known = experiment.identity
    rows = {f"the rows of domain {name!r}": key for name, key in known.stores.items()}
    measured = {f"the rows of target group {domain.name!r}": domain.key for domain in targets.pool.domains}
    return kept | known.fields | rows | measured | {"the frozen parameters": known.base}


def is_done(path: Path) -> bool:
    """Whether the file is there and has the losses of all of its models.

    Raises:
        InputError: it was altered.
    """
    if not path.exists():
        return False
    book = read_sealed(path)
    return len(book["losses"]) >= len(book["members"])


class Book:
    """The file of the models and their losses.

    Attributes:
        losses: of the models that are done, a list of numbers by group each.
        chunks: how many programs have come to their end.
        at_once: how many models the present one has; None: not decided yet.

    Args:
        path: of the file.
        run: what all models must agree with, by name.
        members: the models.
        groups: names of what is measured.
        at_once: as above, the user's.

    Raises:
        InputError: the file is of other models; names what differs.
    """

    def __init__(
        self, path: Path, run: Mapping[str, Any], members: Sequence[Member], groups: Sequence[str], at_once: int | None
    ):
        self._path, self._run, self._groups = path, run, list(groups)
        self._members = [member.identity() for member in members]
        self.losses: list[list[float]] = []
        self.chunks, self.at_once = 0, at_once
        if path.exists():
            self._go_on(read_sealed(path))

    def begin(self, at_once: int) -> None:
        """Notes how many models a program has, before it runs."""
        self.at_once = at_once
        self._write()

    def add(self, losses: Float64[np.ndarray, "S G"]) -> None:
        """Notes the losses of the models that come next."""
        self.losses += losses.tolist()
        self.chunks += 1
        self._write()

    def _go_on(self, saved: Mapping[str, Any]) -> None:
        _check_same(self._path, saved["run"], self._run)
        both = min(len(saved["members"]), len(self._members))
        for before, now in zip(saved["members"][:both], self._members[:both], strict=True):
            _check_same(self._path, before, now)
        self.losses, self.chunks = saved["losses"], saved["chunks"]
        self.at_once = self.at_once or saved["at_once"]
        if len(saved["members"]) > both:
            self._members = saved["members"]

    def _write(self) -> None:
        replace_sealed(
            self._path,
            {
                "run": self._run,
                "members": self._members,
                "at_once": self.at_once,
                "chunks": self.chunks,
                "groups": self._groups,
                "losses": self.losses,
            },
        )


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in {**before, **now}:
        if _plain(before.get(name)) != _plain(now.get(name)):
            was, value = shown(before.get(name), 60), shown(now.get(name), 60)
            raise InputError(f"{path}: its models were trained with {name} = {was}, not {value}; choose another folder")


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
