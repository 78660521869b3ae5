"""Every selector and every order there is goes on exactly: after any checkpoint, and from the middle of a sweep."""

import contextlib
import itertools

import numpy as np
import pytest

from dataflex_jax import preemption
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat
from tests.helpers.command import assert_same_curves, saved_steps
from tests.helpers.policy_runs import some_of
from tests.runs.test_resume import interrupted_at

# What a policy must be given beside its defaults, by name.
FIELDS = {
    "cluster_less": {"selector__cluster_size": 8, "selector__samples_per_cluster": 2},
    "coincide": {"selector__num_clusters": 8},
    "icons": {"targets__group_field": "kind"},
    "delta_loss": {"selector__baseline": "warmup"},
    "nice": {"selector__reward": "tests.helpers.rewards:letters", "selector__max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


def assert_same_run(folder, reference):
    assert_same_curves(folder, reference)
    tiny_chat.assert_same_selections(folder, reference)


@pytest.mark.parametrize("name", some_of("selector", "less", "delta_loss", without=("greats", "rho_loss")))
def test_every_selector_goes_on_as_if_never_interrupted(root, tmp_path, name):
    """Killed before its first choice, inside a window, and at the border of two; those that choose inside the step are
    in test_online_selection.py."""
    config = tiny_chat.config(root, selector=name, checkpoint_every=1, keep=9, train_step=5, **FIELDS.get(name, {}))
    train_and_evaluate(config, tmp_path / "whole")
    steps = saved_steps(tmp_path / "whole")
    assert steps == [1, 2, 3, 4, 5]
    for step in (1, 4) if name in ("delta_loss", "random") else (2,):
        run = interrupted_at(step, tmp_path / "whole", tmp_path / str(step))
        train_and_evaluate(config, run)
        assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", some_of("order", "sorting"))
def test_every_order_goes_on_as_if_never_interrupted(root, tmp_path, monkeypatch, name, dynamic):
    fields = {"order__jitter": 3} if name == "sorting" else {}
    config = tiny_chat.config(root, order=name, order__dynamic=dynamic, checkpoint_every=2, train_step=5, **fields)
    whole = tiny_chat.trained(config, tmp_path / "whole", monkeypatch)
    run = interrupted_at(2, tmp_path / "whole", tmp_path / "run")
    resumed = tiny_chat.trained(config, run, monkeypatch)
    np.testing.assert_array_equal(resumed.rows, whole.rows[2:])
    assert_same_run(run, tmp_path / "whole")
    assert len(whole.decisions()) == (2 if dynamic else 0)


def stopping_at_poll(number):
    """A `preemption.watch` that is asked to stop right before the `number`-th batch of all sweeps."""

    @contextlib.contextmanager
    def watch():
        polls = itertools.count(1)
        stopped = []

        def requested(step):
            if step == 0 and next(polls) == number:
                stopped.append(True)
            return bool(stopped)

        yield requested

    return watch


# Of 67 candidates at 16 a batch a sweep has 5 batches.
@pytest.mark.parametrize(
    ("policies", "poll", "step"),
    [
        ({"selector": "delta_loss"}, 3, 0),  # inside init
        pytest.param({"selector": "delta_loss"}, 8, 1, marks=pytest.mark.slow),
        ({"selector": "delta_loss", "selector__baseline": "warmup"}, 8, 3),
        # Inside the norms of the targets, the sum of their gradients, and the candidates' influence.
        *[pytest.param({"selector": "less"}, poll, 1, marks=pytest.mark.slow) for poll in (1, 3, 6)],
        ({"selector": "loss", "order": "sorting", "order__dynamic": True}, 6, 1),  # the choice is made, not its order
        ({"order": "sorting", "order__dynamic": True, "sweep__batch_rows": 8}, 4, 3),
        # Of two targets four responses each are one batch: stopped right before it.
        pytest.param({"selector": "nice", "targets__group_rows": 1} | FIELDS["nice"], 1, 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_stopped_in_the_middle_of_a_sweep_it_chooses_the_same_afterwards(
    root, tmp_path, monkeypatch, policies, poll, step
):
    config = tiny_chat.config(root, checkpoint_every=5, **policies)
    train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "watch", stopping_at_poll(poll))
        outcome = train_and_evaluate(config, tmp_path / "run")
    assert (outcome.preempted, outcome.step) == (True, step)
    assert saved_steps(tmp_path / "run") == ([step] if step else [])
    train_and_evaluate(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_all_kinds_of_policies_together_go_on(root, tmp_path, monkeypatch):
    """After a checkpoint, and stopped while the weighter or the selector, whose state changes, looks at the model."""
    policies = {"selector": "delta_loss", "order": "zigzag", "mixer": "odm", "weighter": "adapt"}
    options = {"selector__baseline": "warmup", "order__scores": "field:difficulty", "checkpoint_every": 4}
    config = tiny_chat.config(root, **policies, **options, train_step=5)
    train_and_evaluate(config, tmp_path / "whole")
    lines = tiny.records(tmp_path / "whole", "policy.jsonl")
    assert [line["order"] for line in lines if "file" in line] == ["zigzag", "zigzag"]
    assert [line["step"] for line in lines if "refreshed" in line] == [1]
    run = interrupted_at(4, tmp_path / "whole", tmp_path / "run")
    train_and_evaluate(config, run)
    assert_same_run(run, tmp_path / "whole")
    for poll in (1, 6):
        run = tmp_path / str(poll)
        with monkeypatch.context() as patch:
            patch.setattr(preemption, "watch", stopping_at_poll(poll))
            outcome = train_and_evaluate(config, run)
        assert (outcome.preempted, outcome.step) == (True, 1)
        train_and_evaluate(config, run)
        assert_same_run(run, tmp_path / "whole")
