"""What is refused before a task is opened; the harness's own part is a stand-in here."""

import importlib.util
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.harness import tasks
from dataflex_jax.harness.tasks import Settings, check


@pytest.fixture
def harness(monkeypatch):
    """Three tasks of a package that is not there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    manager = SimpleNamespace(all_tasks=["mmlu", "mmlu_virology", "arc_easy"])
    monkeypatch.setattr(tasks, "_manager", lambda include_path: manager)


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--tasks=mmlu,a: needs lm_eval.* pip install 'dataflex_jax\[eval\]'$"):
        check(Settings(("mmlu", "a")))


def test_an_unknown_task_is_refused_with_the_nearest_names(harness):
    check(Settings(("mmlu", "arc_easy")))
    with pytest.raises(InputError, match=r"no task 'mmlu_virolgy'; the nearest are mmlu_virology$"):
        check(Settings(("arc_easy", "mmlu_virolgy")))
    with pytest.raises(InputError, match=r"^config.eval_tasks = .*the nearest are none"):
        check(Settings(("zzzzzz",), prefix="eval_"))


@pytest.mark.parametrize("field", ["include_path", "mmlu_root"])
def test_a_folder_that_there_is_not_is_refused(harness, tmp_path, field):
    with pytest.raises(InputError, match=f"^--{field}={tmp_path}/none: no such folder"):
        check(Settings(("mmlu",), **{field: str(tmp_path / "none")}))


def test_tasks_that_fail_to_open_are_one_line():
    def load(name):
        raise ConnectionError("the hub\nis far away")

    with pytest.raises(InputError, match=r"^task 'mmlu' cannot be opened \(ConnectionError: the hub is far away\)"):
        tasks._open(SimpleNamespace(load=load), "mmlu")


@pytest.mark.parametrize(("mark", "reason"), [("MULTIMODAL", "asks about images"), ("UNSAFE_CODE", "runs code that")])
def test_tasks_that_ask_for_more_than_text_are_refused(mark, reason):
    loaded = {"groups": {}, "tasks": {"a": SimpleNamespace(**{mark: True})}}
    with pytest.raises(InputError, match=f"^task 'a' {reason}"):
        tasks._open(SimpleNamespace(load=lambda name: loaded), "a")


def test_a_group_is_asked_whole_and_a_tag_task_by_task():
    loaded = {"groups": {"mmlu": "the group"}, "tasks": {"a": "task a", "b": "task b"}}
    manager = SimpleNamespace(load=lambda name: loaded)
    assert tasks._open(manager, "mmlu") == ["the group"]
    assert tasks._open(manager, "a_tag") == ["task a", "task b"]


def test_the_process_is_as_it_was_before_the_harness_seeded_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    with tasks._outside_as_it_was():
        assert "LOCAL_RANK" not in os.environ
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    assert os.environ["LOCAL_RANK"] == "3"
