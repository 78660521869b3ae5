"""Where metrics go: the file, TensorBoard and Weights & Biases, also after a resume."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.json_lines import read_jsonl
from dataflex_jax.reporting.progress import Progress
from dataflex_jax.reporting.trackers import MetricsLogger, flatten
from tests.helpers.trackers import Wandb, events, scalars


def test_metrics_go_to_the_file_and_to_tensorboard(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": jnp.float32(2.5), "mfu": None, "domain_loss": {"a/b": 1.0, "c": math.nan}})
        logger.track(1, {"overall": {"nll": 3.0}, "split": "valid"}, "eval/valid")
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "mfu": None, "domain_loss": {"a/b": 1.0, "c": None}}
    ]
    (file,) = events(tmp_path)
    assert scalars(file) == {("loss", 1): 2.5, ("domain_loss/a/b", 1): 1.0, ("eval/valid/overall/nll", 1): 3.0}


def test_curves_that_are_not_metrics_stay_out_of_the_file(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": 2.5}, {"mixer": {"reward": {"a": 1.0}, "name": "x", "last": [1, 2]}})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    (file,) = events(tmp_path)
    assert scalars(file) == {("loss", 1): 2.5, ("mixer/reward/a", 1): 1.0}


def test_tensorboard_can_be_off(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    refused = pytest.raises(TrainingError, match=r"metrics\.jsonl at step 7: loss is nan")
    with MetricsLogger(tmp_path, tensorboard=False) as logger, refused:
        logger.log(7, {"loss": jnp.float32("nan")})
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": float(step)})
    with MetricsLogger(tmp_path) as logger:
        logger.truncate_after(2)
        logger.log(3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    first, second = events(tmp_path)
    assert scalars(first)[("loss", 3)] == 3.0
    # TensorBoard drops every earlier point at or after the step of a session start.
    starts = [event.step for event in second if event.session_log.status == SessionLog.START]
    assert starts == [3]
    assert scalars(second) == {("loss", 3): 30.0}


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLogger(tmp_path) as logger:
        logger.truncate_after(0)
        logger.log(1, {"loss": 1.0})
        logger.track(1, {"nll": 1.0}, "eval")
    with Progress(10) as progress:
        progress.update(10, loss=1.0)
        progress.message("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_wandb_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^config.wandb_project = 'project': .*pip install dataflex_jax\[wandb\]"):
        MetricsLogger(tmp_path, wandb="project")


def test_wandb_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    class Wandb:
        class errors:
            Error = LookupError

        def init(**_):
            raise LookupError("No API key\nconfigured.")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with pytest.raises(InputError, match=r"^config.wandb_project = 'project': wandb: No API key configured.$"):
        MetricsLogger(tmp_path, wandb="project")


def test_wandb_gets_the_steps_and_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run"
    config = {"seed": 1, "mixer": None, "data": {"domains": ("a", "b"), "share": np.float32(0.5)}}
    with MetricsLogger(folder, tensorboard=False, wandb="project", config=config) as logger:
        logger.log(1, {"loss": 2.0, "mfu": None, "domain_loss": {"a": 1.0}})
    with MetricsLogger(folder, tensorboard=False, wandb={"project": "p", "entity": "e", "name": "n"}):
        pass
    first, second = wandb.runs
    plain = {"seed": 1, "mixer": None, "data": {"domains": ["a", "b"], "share": 0.5}}
    names = {"dir": str(folder), "name": "run", "project": "project"}
    assert first.arguments == {**names, "resume": "allow", "config": plain}
    assert first.logged == [{"step": 1, "loss": 2.0, "domain_loss/a": 1.0}]
    assert ("*", "step") in first.defined
    assert first.finished
    assert second.arguments["id"] == "new-id"
    assert second.arguments["entity"] == "e"
    assert second.arguments["name"] == "n"


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}, "p") == {"p/a/b": 1, "p/a/c/d": 2, "p/e": [3]}


def test_tensorboard_needs_neither_tensorflow_nor_torch(tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, tensorflow=None)\n"
        "from dataflex_jax.reporting.trackers import MetricsLogger\n"
        f"with MetricsLogger({str(tmp_path)!r}) as logger: logger.log(1, {{'loss': 1.5}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = events(tmp_path)
    assert scalars(file) == {("loss", 1): 1.5}
