"""What a folder knows of its models: which they are, and the losses of those that are done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError, shown
from dataflex_jax.files import digest, read_sealed, replace_sealed
from dataflex_jax.mapped.members import Member
from dataflex_jax.training import changes
from dataflex_jax.training.assembly import Experiment

FILE = "models.json"
# Fields that change no model and nothing that is measured of it, or that name what is known by its contents. The mesh
# is all devices along "data" in any case.
_WITHOUT_EFFECT = ("log_every", "eval_every", "evaluators", "checkpoint_every", "keep", "tensorboard")
_WITHOUT_EFFECT += ("eval_tasks", "eval_tasks_every", "eval_num_fewshot", "eval_limit", "eval_include_path")
_WITHOUT_EFFECT += ("eval_mmlu_root",)
_WITHOUT_EFFECT += ("wandb_project", "data.cache_dir", "data.verify", "sweep", "mesh", "selector", "order")
_WITHOUT_EFFECT += ("data.tokenizer", "data.root", "targets.root")


def identity(experiment: Experiment, targets: Sequence[TargetSet]) -> dict[str, Any]:
    """What models and measurements must agree with that are kept together, by name."""
    fields = changes.flat(experiment.config.to_dict())
    kept = {
        f"config.{name}": value
        for name, value in fields.items()
        if name not in _WITHOUT_EFFECT and name.partition(".")[0] not in _WITHOUT_EFFECT
    }
    known = experiment.identity
    rows = {f"the rows of domain {name!r}": key for name, key in known.stores.items()}
    domains = [domain for each in targets for domain in each.pool.domains]
    measured = {f"the rows of target group {domain.name!r}": domain.key for domain in domains}
    return kept | known.fields | rows | measured | {"the frozen parameters": known.base}


class Book:
    """The file of the models that are done and their losses.

    Args:
        path: of the file.
        run: what all models must agree with, by name; see `identity`.
        groups: names of what is measured.

    Raises:
        InputError: the file was altered, or is of other models; names what differs.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], groups: Sequence[str]):
        self._path, self._run, self._groups = path, run, list(groups)
        self._models: dict[str, dict[str, Any]] = {}
        if path.exists():
            saved = read_sealed(path)
            if not isinstance(saved, dict) or not {"run", "models"} <= saved.keys():
                raise InputError(f"{path}: not the file of trained models; choose another folder")
            _check_same(path, saved["run"], run)
            self._models = {_key(model): model for model in saved["models"]}

    def missing(self, members: Sequence[Member]) -> list[Member]:
        """Those that are not done."""
        return [member for member in members if _key(member.identity()) not in self._models]

    def has(self, identities: Sequence[Mapping[str, Any]]) -> bool:
        """Whether members are done, by what `Member.identity` gave."""
        return all(_key(known) in self._models for known in identities)

    def losses(self, members: Sequence[Member]) -> Float64[np.ndarray, "S G"]:
        """Of members that are done."""
        return np.array([self._models[_key(member.identity())]["losses"] for member in members])

    def add(self, members: Sequence[Member], losses: Float64[np.ndarray, "S G"]) -> None:
        """Notes that members are done."""
        for member, of_member in zip(members, losses.tolist(), strict=True):
            known = member.identity()
            self._models[_key(known)] = known | {"losses": of_member}
        models = list(self._models.values())
        replace_sealed(self._path, {"run": self._run, "groups": self._groups, "models": models})


def _key(model: Mapping[str, Any]) -> str:
    return digest([model["seed"], model["proportions"], model["rows"]])


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in {**before, **now}:
        if name.startswith("config.") and not (name in before and name in now):
            continue  # another version has another set of fields
        if _plain(before.get(name)) != _plain(now.get(name)):
            was, value = shown(before.get(name), 60), shown(now.get(name), 60)
            raise InputError(f"{path}: its models were trained with {name} = {was}, not {value}; choose another folder")


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
