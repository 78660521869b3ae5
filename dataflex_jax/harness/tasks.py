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
from dataflex_jax.harness import mmlu
from dataflex_jax.models.model import Model

_NEAREST = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which tasks are asked, and how.

    Attributes:
        names: of tasks, groups and tags.
        num_fewshot: examples before each question; None: as each task says.
        limit: the first so many questions of each task, or below 1 that share of them; None: all.
        include_path: a folder with further tasks as YAML files; None: none.
        mmlu_root: a folder with MMLU's files, in place of the hub's data set.
        chat: whether questions are turns of a conversation, in the tokenizer's chat template.
    """

    names: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str | None = None
    mmlu_root: str | None = None
    chat: bool = False


def check_installed(option: str) -> None:
    """Refuses to ask tasks where the package for it is missing.

    Args:
        option: that asks for it, for messages.

    Raises:
        InputError: how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("needs lm_eval, which is not installed: pip install 'dataflex_jax[eval]'", option=option)


class Tasks:
    """Opened tasks.

    Args:
        settings: which, and how they are asked.
        tokenizer: of the models.
        mesh: the devices.
        option: that names them, for messages.

    Raises:
        InputError: `lm_eval` is not installed, a task that there is not, or one whose data cannot be read.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer, mesh: Mesh, option: str):
        check_installed(option)
        from dataflex_jax.harness.language_model import LanguageModel

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if settings.mmlu_root is not None:
            mmlu.check_root(settings.mmlu_root)
        self._settings = settings
        self._language_model = LanguageModel(tokenizer, mesh)
        manager = _manager(settings.include_path)
        _check_names(settings.names, manager.all_tasks, option)
        with _over_local_files(manager.task_index, settings.mmlu_root):
            self._opened = {name: _open(manager, name) for name in settings.names}

    def results(self, name: str, model: Model) -> dict[str, Any]:
        """What the harness finds of a model in a task, group or tag, as it writes it, with every question.

        Args:
            name: one of the settings'.
            model: on the mesh.

        Raises:
            InputError: the task asks for what the model cannot do.
        """
        from lm_eval.evaluator import simple_evaluate

        self._language_model.model = model
        with _outside_as_it_was():
            return simple_evaluate(
                model=self._language_model,
                tasks=list(self._opened[name]),
                num_fewshot=self._settings.num_fewshot,
                limit=self._settings.limit,
                apply_chat_template=self._settings.chat,
                task_manager=_manager(self._settings.include_path),
            )


@functools.cache
def _manager(include_path: str | None) -> Any:
    """The harness's `TaskManager`, which takes seconds to read what tasks there are."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError("no such folder", option="--include_path", value=include_path)
    return TaskManager(include_path=include_path)


def _check_names(names: Sequence[str], known: Sequence[str], option: str) -> None:
    for name in names:
        if name not in known:
            nearest = ", ".join(difflib.get_close_matches(name, known, _NEAREST))
            raise InputError(
                f"there is no task {name!r}; {f'the nearest are {nearest}' if nearest else 'see lm_eval'}",
                option=option,
            )


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
    group = loaded["groups"].get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


@contextlib.contextmanager
def _over_local_files(index: dict[str, Any], mmlu_root: str | None) -> Iterator[None]:
    """While this is entered, tasks of MMLU are over the files of a folder; None: over the hub's, as they are."""
    from lm_eval.tasks._yaml_loader import load_yaml

    kept = {} if mmlu_root is None else {name: entry for name, entry in index.items() if _is_mmlu(entry.cfg)}
    for name, entry in kept.items():
        config = load_yaml(entry.yaml_path)
        config["custom_dataset"] = functools.partial(_splits, mmlu_root, config["dataset_name"])
        index[name] = dataclasses.replace(entry, yaml_path=None, cfg=config)
    try:
        yield
    finally:
        index.update(kept)


def _is_mmlu(config: Mapping[str, Any] | None) -> bool:
    return (
        bool(config) and config.get("dataset_path") in mmlu.HUB_NAMES and "dataset_name" in config and "task" in config
    )


def _splits(root: str, subject: str, **about_the_task: Any) -> Any:
    del about_the_task
    return mmlu.splits(root, subject)


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
