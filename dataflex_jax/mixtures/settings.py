"""Swarms over hyperparameters and seeds: models that differ by fields of the configuration, beside each other.

A hyperparameter is a constant of the program, so the models of one setting, one a seed, are a program; another setting
is another program.
"""

import ast
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError, one_line
from dataflex_jax.files import file_name, replace_json
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.models import train_and_measure
from dataflex_jax.mixtures import tables
from dataflex_jax.mixtures.swarm import Swarm, figures, metric_names, opened_swarm
from dataflex_jax.reporting.intervals import Difference, difference, spread

SETTINGS, JSON = "settings.csv", "settings.json"
_FOLDER = "settings"
_SECTIONS = ("mixer", "weighter", "optim", "model", "lora")
_FIELDS = ("train_step", "warmup_step", "update_step", "update_times", "data.batch_size", "data.lag", "data.draw")
_MEAN = "mean"


class Setting(NamedTuple):
    """Values of some fields.

    Attributes:
        name: "FIELD=VALUE, ...".
        fields: by dotted name, without "config.".
    """

    name: str
    fields: Mapping[str, Any]

    def of(self, config: ConfigDict) -> ConfigDict:
        """The configuration with these values.

        Raises:
            InputError: it has no such field, or another type of value.
        """
        config = config.copy_and_resolve_references()
        for name, value in self.fields.items():
            *path, field = name.split(".")
            section = config
            for part in path:
                section = section.get(part) if isinstance(section, ConfigDict) else None
            if not isinstance(section, ConfigDict) or field not in section:
                raise InputError("is no field of this configuration", option="--vary", value=name)
            try:
                section[field] = value
            except TypeError as error:
                raise InputError(one_line(error), option="--vary", value=f"{name}={value}") from error
        return config


class Compared(NamedTuple):
    """What the models of all settings came to.

    Attributes:
        settings: the n settings.
        seeds: of each one's models.
        metrics: names of the M figures, of which less is better.
        values: of each model.
        summary: of each model, the mean of the figures that settings are compared by.
        against: how much larger each setting's summary is than the first one's, seed by seed.
    """

    settings: Sequence[Setting]
    seeds: Sequence[int]
    metrics: Sequence[str]
    values: Float64[np.ndarray, "n S M"]
    summary: Float64[np.ndarray, "n S"]
    against: Sequence[Difference | None]


def settings(vary: Sequence[str]) -> list[Setting]:
    """All combinations of values.

    Args:
        vary: "FIELD=VALUE,VALUE,..." each; values are Python literals or words.

    Raises:
        InputError: what is no such text, a field twice, or one in which models may not differ here.
    """
    choices: dict[str, list[Any]] = {}
    for text in vary:
        name, equals, values = text.partition("=")
        name = name.removeprefix("config.")
        if not equals or not values:
            raise InputError("FIELD=VALUE,VALUE is expected, as in mixer.alpha=0.5,0.9", option="--vary", value=text)
        _check_field(name)
        if name in choices:
            raise InputError("is given twice; put its values together", option="--vary", value=name)
        choices[name] = _values(values)
        if len(set(map(repr, choices[name]))) < len(choices[name]):  # 1 and True are two values
            raise InputError("a value is there twice", option="--vary", value=text)
    made = []
    for values in itertools.product(*choices.values()):
        fields = dict(zip(choices, values, strict=True))
        made.append(Setting(", ".join(f"{name}={value}" for name, value in fields.items()), fields))
    return made


def compared(
    config: ConfigDict,
    folder: Path,
    chosen: Sequence[Setting],
    seeds: Sequence[int],
    fitted: str | None,
    at_once: int | None,
) -> Compared | None:
    """Trains the models that the folder does not have yet, and writes the tables.

    Args:
        config: of all models but for the settings.
        folder: for what is kept of them.
        chosen: the settings; they are checked before anything is trained.
        seeds: of each one's models.
        fitted: a pattern of the figures to compare by; see `tables.read`.
        at_once: models that are trained as one program; None: as many as fit.

    Returns:
        What they came to; None where a request to stop came first: what was trained is saved.

    Raises:
        InputError: a configuration or an input that cannot be run, or a folder of other models.
        TrainingError: a model that cannot go on.
    """
    configs = [setting.of(config) for setting in chosen]
    found = []
    for setting, of_setting in zip(chosen, configs, strict=True):
        with opened_swarm(of_setting, folder / _FOLDER / file_name(setting.name)) as models:
            values = _measured(models, setting, seeds, at_once)
            metrics = metric_names(models)
        if values is None:
            return None
        found.append(values)
    values = np.stack(found)
    columns = [metrics.index(name) for name in tables.matching(metrics, fitted)]
    summary = values[..., columns].mean(axis=-1)
    first, *others = (dict(zip(seeds, of_setting.tolist(), strict=True)) for of_setting in summary)
    against = [None, *(difference(other, first) for other in others)]
    what = Compared(chosen, seeds, metrics, values, summary, against)
    _write(folder, what)
    return what


def table(what: Compared) -> str:
    """A line for each setting, the least mean first."""
    width = max(len(setting.name) for setting in (*what.settings, Setting("setting", {})))
    lines = [f"{'setting':{width}} {_MEAN:>9} {'std':>8}  over the first, 95 %"]
    for number in np.argsort(what.summary.mean(axis=1), kind="stable"):
        mean, std = spread(what.summary[number])
        change, beside = what.against[number], ""
        if change is not None and change.low is not None:
            beside = f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
        elif change is not None:
            beside = f"{change.mean:+.4f}"
        deviation = "" if std is None else f"{std:.4f}"
        lines.append(f"{what.settings[number].name:{width}} {mean:9.4f} {deviation:>8}  {beside}".rstrip())
    return "\n".join(lines)


def _measured(
    models: Swarm, setting: Setting, seeds: Sequence[int], at_once: int | None
) -> Float64[np.ndarray, "S M"] | None:
    members = [Member(f"{setting.name}, seed {seed}", seed) for seed in seeds]
    losses = train_and_measure(models.shared, members, models.measured, at_once=at_once)
    return None if losses is None else figures(models, losses)


def _write(folder: Path, what: Compared) -> None:
    names = list(what.settings[0].fields)
    lines = [[setting.name, *(str(setting.fields[name]) for name in names)] for setting in what.settings]
    tables.write(folder / SETTINGS, [tables.RUN, *names], lines)
    tables.write_metrics(folder, [setting.name for setting in what.settings], what.seeds, what.metrics, what.values)
    replace_json(folder / JSON, {"settings": [_as_json(what, n) for n in range(len(what.settings))]}, indent=1)


def _as_json(what: Compared, number: int) -> dict[str, Any]:
    mean, std = spread(what.summary[number])
    change = what.against[number]
    return {
        "name": what.settings[number].name,
        "fields": dict(what.settings[number].fields),
        _MEAN: mean,
        "std": std,
        "values": dict(zip(map(str, what.seeds), what.summary[number].tolist(), strict=True)),
        "over_the_first": None if change is None else change._asdict(),
    }


def _check_field(name: str) -> None:
    section, dot, field = name.partition(".")
    if (section in _SECTIONS and dot and field != "name") or name in _FIELDS:
        return
    reason = f"models may not differ in it; fields of {', '.join(_SECTIONS)} and {', '.join(_FIELDS)} are accepted"
    if name == "seed":
        reason = "--seeds says how many"
    raise InputError(reason, option="--vary", value=name)


def _values(text: str) -> list[Any]:
    try:
        return list(ast.literal_eval(f"({text},)"))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it raises of bad text
        return [_word(part.strip()) for part in text.split(",")]


def _word(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text, text)
