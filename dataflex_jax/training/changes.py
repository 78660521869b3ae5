"""What the user has changed since a run was last started: said, and named where a checkpoint forbids it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.training import optim, run_config

logger = logging.getLogger(__name__)

# Sections of the configuration that decide the shapes of a part of the state.
_SECTIONS = {"opt_state": "optim", "mixer": "mixer", "weighters": "weighter"}

_SCHEDULE = ("train_step", "optim.learning_rate", "optim.schedule", "optim.warmup_ratio")

# By dotted field name: the values before and now.
Changed = dict[str, tuple[Any, Any]]


def last_started_with(run_folder: Path) -> ConfigDict | None:
    """The configuration that a run was last started with; None: its config.json is gone or damaged, which is said."""
    try:
        return run_config.read(run_folder)
    except InputError as error:
        logger.warning("%s; what has changed since the last start is not known, and it is written anew.", error)
        return None


def changed(before: ConfigDict | None, now: ConfigDict) -> Changed:
    """The fields that both have and that differ."""
    if before is None:
        return {}
    old, new = flat(before.to_dict()), flat(now.to_dict())
    return {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}


def check_tokenizer(changed: Changed) -> None:
    """Refuses to train another tokenizer for a run, which goes on with the one that it has.

    Raises:
        InputError: names both.
    """
    before, now = changed.get("data.tokenizer", ("", ""))
    if now.startswith("train:"):
        reason = f"the run was started with {before!r}; keep that, or use a new --workdir"
        raise InputError(reason, option="data.tokenizer", value=now)


def say(changed: Changed, before: ConfigDict | None, now: ConfigDict, step: int) -> None:
    """Says what has changed, and where this moves the learning rate of the steps to come."""
    if not changed:
        return
    logger.info(
        "Changed since the last start: %s.",
        ", ".join(f"config.{name} = {value!r} (was {old!r})" for name, (old, value) in changed.items()),
    )
    fields = [name for name in changed if name in _SCHEDULE]
    was, rate = (float(optim.learning_rate(c.optim, c.train_step)(step)) for c in (before, now))
    if not math.isclose(was, rate, rel_tol=1e-3):
        logger.warning(
            "The learning rate of step %d is %.3g; as the run was last started it would be %.3g (%s).",
            step + 1,
            rate,
            was,
            ", ".join(f"config.{name}" for name in fields),
        )


def other_state(found: Mapping[str, tuple], expected: Mapping[str, tuple], changed: Changed) -> InputError | None:
    """Why the state of a sound checkpoint cannot be read into that of the run; None: not because of its shapes.

    Args:
        found: the shape of each leaf in the checkpoint, by path.
        expected: of each leaf in the run.
        changed: since the run was last started.
    """
    for path in {**expected, **found}:
        section = _SECTIONS.get(path.partition("/")[0])
        if section is None or found.get(path) == expected.get(path):
            continue
        was, now = (f"has shape {shapes[path]}" if path in shapes else "is none" for shapes in (found, expected))
        what = f"{path} {was} in the checkpoint, and {now} in this run"
        names = [name for name in changed if name.startswith(f"{section}.")]
        if not names:
            return InputError(f"{what}; the code or the options of config.{section} are others; use a new --workdir")
        before, value = changed[names[0]]
        others = "".join(f", config.{name} back to {changed[name][0]!r}" for name in names[1:])
        reason = f"{what}; set it back to {before!r}{others}, or use a new --workdir"
        return InputError(reason, option=names[0], value=value)
    return None


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested sections by dotted names, lists as tuples."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return found
