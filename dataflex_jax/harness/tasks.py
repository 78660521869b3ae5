"""Tasks of lm-evaluation-harness by their names: opened once, then asked of one model or many.

The package `lm_eval` is optional (`pip install dataflex_jax[eval]`), and imported when tasks are opened.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError, one_line
from dataflex_jax.harness import mmlu, results
from dataflex_jax.models.model import Model

_NEAREST = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which tasks are asked, and how.

    Attributes:
        tasks: names of tasks, groups and tags.
        num_fewshot: examples before each question; None: as each task says.
        limit: the first so many questions of each task, or below 1 that share of them; None: all.
        include_path: a folder with further tasks as YAML files; None: none.
        mmlu_root: a folder with MMLU's files, in place of the hub's data set.
        apply_chat_template: whether questions are turns of a conversation, in the tokenizer's chat template.
        prefix: of these names as the user knows them, for messages: "--" of flags, "eval_" of the configuration.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str | None = None
    mmlu_root: str | None = None
    apply_chat_template: bool = False
    prefix: str = "--"

    def refused(self, field: str, reason: str) -> InputError:
        """What to raise where a field cannot be what it is."""
        value = getattr(self, field)
        if self.prefix == "--" and isinstance(value, tuple):
            value = ",".join(value)
        return InputError(reason, option=f"{self.prefix}{field}", value=value)


def check(settings: Settings) -> None:
    """Refuses what can be refused before a task is opened.

    Raises:
        InputError: `lm_eval` is not installed, a task that there is not, or a folder without what it must hold.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise settings.refused("tasks", "needs lm_eval, which is not installed: pip install 'dataflex_jax[eval]'")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise settings.refused("include_path", "no such folder")
    if settings.mmlu_root is not None and (fault := mmlu.fault_of(Path(settings.mmlu_root))):
        raise settings.refused("mmlu_root", fault)
    known = _manager(settings.include_path).all_tasks
    for name in settings.tasks:
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(name, known, _NEAREST))
            raise settings.refused("tasks", f"there is no task {name!r}; the nearest are {nearest or 'none'}")


class Tasks:
    """Opened tasks.

    Attributes:
        language_model: whom the harness asks.

    Args:
        settings: which, and how they are asked.
        tokenizer: of the models.
        mesh: the devices.

    Raises:
        InputError: as `check`, or a task whose data cannot be read.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer, mesh: Mesh):
        check(settings)
        from dataflex_jax.harness.language_model import LanguageModel

        self._settings = settings
        self.language_model = LanguageModel(tokenizer, mesh)
        manager = _manager(settings.include_path)
        with _over_local_files(manager.task_index, settings.mmlu_root):
            self._opened = {name: _open(manager, name) for name in settings.tasks}

    def results(self, name: str, model: Model) -> dict[str, Any]:
        """What the harness finds of a model in a task, group or tag, as it writes it, without the single questions.

        Where the right answer is one of several, "bits_per_byte,none" is among the metrics: the bits that the model
        needs for it, a byte of its UTF-8 text, which moves before the accuracy of a small model does.

        Args:
            name: one of the settings'.
            model: on the mesh.

        Raises:
            InputError: the task asks for what the model cannot do.
        """
        from lm_eval.evaluator import simple_evaluate

        self.language_model.model = model
        with _outside_as_it_was():
            found = simple_evaluate(
                model=self.language_model,
                tasks=list(self._opened[name]),
                num_fewshot=self._settings.num_fewshot,
                limit=self._settings.limit,
                apply_chat_template=self._settings.apply_chat_template,
                task_manager=_manager(self._settings.include_path),
            )
        return results.with_bits(found)


@functools.cache
def _manager(include_path: str | None) -> Any:
    """The harness's `TaskManager`, which takes seconds to read what tasks there are."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path)


def _open(manager: Any, name: str) -> Sequence[Any]:
    """The harness's own objects for a name: a group, or one or more tasks."""
    try:
        loaded = manager.load(name)
    except InputError:
        raise
    except Exception as error:  # a task is a program that reads what it likes from where it likes
        what = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(
            f"task {name!r} cannot be opened ({what}); its data come from the Hugging Face hub, or where its YAML says"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name!r} asks about images or sounds, which no model here takes")
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name!r} runs code that the model writes, which is not done here")
    group = loaded["groups"].get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


@contextlib.contextmanager
def _over_local_files(index: dict[str, Any], mmlu_root: str | None) -> Iterator[None]:
    """While this is entered, tasks of MMLU are over the files of a folder; None: over the hub's, as they are."""
    from lm_eval.tasks._yaml_loader import load_yaml

    kept = {} if mmlu_root is None else {name: entry for name, entry in index.items() if _is_mmlu(entry.cfg)}
    for name, entry in kept.items():
        config = load_yaml(entry.yaml_path)
        config["custom_dataset"] = mmlu.LocalQuestions(mmlu_root, config["dataset_name"])
        index[name] = dataclasses.replace(entry, yaml_path=None, cfg=config)
    try:
        yield
    finally:
        index.update(kept)


def _is_mmlu(config: Mapping[str, Any] | None) -> bool:
    return (
        bool(config) and config.get("dataset_path") in mmlu.HUB_NAMES and "dataset_name" in config and "task" in config
    )


@contextlib.contextmanager
def _outside_as_it_was() -> Iterator[None]:
    """Undoes what the harness does to the process: it seeds the global generators of random numbers.

    And takes LOCAL_RANK for the number of one of several processes that share the questions, which these do not.
    """
    drawn, drawn_by_numpy, rank = random.getstate(), np.random.get_state(), os.environ.pop("LOCAL_RANK", None)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)  # noqa: NPY002
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
