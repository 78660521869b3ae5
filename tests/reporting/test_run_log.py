"""The lines that a run writes of its steps and evaluations, and what is said of them."""

import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from dataflex_jax.json_lines import read_jsonl
from dataflex_jax.reporting.run_log import LogSettings, RunLog, Standing, named_state
from tests.helpers.trackers import Wandb, events, scalars

SETTINGS = LogSettings(
    domains={"a": 10, "b": 20},
    mixer="odm",
    mixer_log=None,
    policies=True,
    log_every=2,
    train_step=5,
    tensorboard=False,
    wandb_project=None,
    config={"seed": 3},
    flops_per_token=1.0,
    peak_flops=None,
)


def values(step):
    """A step's metrics, with a batch that has rows of the first domain alone."""
    shares = np.array([0.25, 0.75])
    return {
        **{"loss": 2.0 + step, "learning_rate": 0.1, "grad_norm": 1.0, "inputs": 8.0},
        **{"domain_loss": np.array([2.0, 0.0]), "domain_rows": np.array([3, 0]), "drawn_with": shares},
        **{"mixer": {"reward": np.array([1.0, 2.0])}, "sampling_weights": shares[::-1]},
    }


def standing(step, effective_step=None):
    return Standing(8 * step, np.array([3 * step, 0]), effective_step)


def test_every_step_has_a_line_of_the_mixer_and_some_have_metrics(tmp_path):
    with RunLog(SETTINGS, tmp_path, 0) as log:
        for step in range(1, 6):
            log.stepped(step, values(step), standing(step, 7 if step == 5 else None))
    metrics, policy = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "policy.jsonl")
    assert [line["step"] for line in metrics] == [2, 4, 5]
    assert metrics[0]["domain_loss"] == {"a": 2.0, "b": None}
    assert metrics[0]["domain_epochs"] == {"a": 0.6, "b": 0.0}
    assert metrics[-1]["tokens_seen"] == 40
    assert [(line["published"], line["effective_step"]) for line in policy] == [(False, None)] * 4 + [(True, 7)]
    assert policy[0]["observed"] == {
        "domain_loss": {"a": 2.0, "b": None},
        "domain_rows": {"a": 3, "b": 0},
        "drawn_with": {"a": 0.25, "b": 0.75},
    }
    assert policy[0]["state"] == {"reward": {"a": 1.0, "b": 2.0}}
    assert policy[0]["sampling_weights"] == {"a": 0.75, "b": 0.25}


def test_a_restart_drops_what_is_done_again(tmp_path):
    """What was decided after the checkpoint's step is decided again, what was observed in it is not."""
    with RunLog(SETTINGS, tmp_path, 0) as log:
        for step in range(1, 4):
            log.stepped(step, values(step), standing(step))
            log.decided({"step": step, "policy": "adapt", "refreshed": 4})
            log.evaluated(step, {"split": "valid", "domains": {}, "overall": None})
    RunLog(SETTINGS, tmp_path, 2).__exit__()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [2]
    assert [(line["step"], line["policy"]) for line in read_jsonl(tmp_path / "policy.jsonl")] == [
        (1, "odm"),
        (1, "adapt"),
        (2, "odm"),
    ]
    assert [line["step"] for line in read_jsonl(tmp_path / "eval.jsonl")] == [1, 2]


SELECTION = {
    **{"step": 2, "seconds": 1.5, "update": 0, "pool": 30, "policy": "less", "file": "selections/step_00000002.npz"},
    **{"selected": 4, "distinct": 3, "not_finite": 1, "coverage": 0.25, "overlap": None},
    **{"domain_share": {"a": 0.75, "b": 0.25}, "score_min": -1.0, "score_mean": 0.5, "score_max": 2.0},
}


def test_mixtures_example_weights_and_selections_are_curves(tmp_path):
    """At the steps of metrics.jsonl the mixture and the mixer's state, and every selection."""
    weights = {"example_weight_min": 0.5, "example_weight_max": 2.0, "effective_sample_size": 6.0}
    with RunLog(SETTINGS._replace(tensorboard=True), tmp_path, 0) as log:
        for step in (1, 2):
            log.stepped(step, values(step) | weights, standing(step))
        log.decided(SELECTION)
        log.decided({"step": 2, "policy": "adapt", "refreshed": 4})
    (file,) = events(tmp_path)
    curves = scalars(file)
    assert {step for _, step in curves} == {2}
    found = {tag: value for (tag, _), value in curves.items()}
    mixture = {"sampling_weights/a": 0.75, "sampling_weights/b": 0.25, "drawn_with/a": 0.25, "drawn_with/b": 0.75}
    selection = {"domain_share/a": 0.75, "domain_share/b": 0.25, "coverage": 0.25, "score_mean": 0.5, "distinct": 3}
    expected = mixture | weights | {"mixer/reward/a": 1.0, "mixer/reward/b": 2.0}
    expected |= {f"selection/{name}": value for name, value in selection.items()}
    assert expected.items() <= found.items()
    assert "selection/overlap" not in found
    assert not any("refreshed" in tag or "seconds" in tag for tag in found)
    assert not {"sampling_weights", "drawn_with", "mixer"} & read_jsonl(tmp_path / "metrics.jsonl")[0].keys()


def test_wandb_gets_the_configuration_and_a_step_at_once(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(SETTINGS._replace(wandb_project="project"), tmp_path, 0) as log:
        log.stepped(2, values(2), standing(2))
        log.decided(SELECTION)
    (run,) = wandb.runs
    assert run.arguments["config"] == {"seed": 3}
    step, selection = run.logged
    assert (step["loss"], step["sampling_weights/a"], step["mixer/reward/b"]) == (4.0, 0.75, 2.0)
    assert (selection["step"], selection["selection/coverage"]) == (2, 0.25)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"split": "valid", "domains": {"a": {"nll": 2.0}, "b": {"nll": 3.0}}, "overall": {"nll": 2.5}},
            "step 4: held-out nll 2.5000 (a 2.000, b 3.000)",
        ),
        (
            {"split": "exam", "domains": {"law": {"accuracy": 0.5}}, "overall": {"accuracy": 0.25, "samples": 8}},
            "step 4: exam accuracy 0.25, samples 8",
        ),
        ({"split": "exam", "domains": {}, "overall": None}, None),
        (
            {"split": "exam", "domains": {"law": {"accuracy": 0.5}}, "overall": {"nll": 2.5}},
            "step 4: held-out nll 2.5000 ()",
        ),
    ],
)
def test_any_evaluation_is_written_and_said(tmp_path, capsys, record, said):
    with RunLog(SETTINGS, tmp_path, 0) as log:
        log.evaluated(4, record)
    assert read_jsonl(tmp_path / "eval.jsonl") == [{"step": 4, **record}]
    assert capsys.readouterr().err.splitlines() == ([] if said is None else [said])


def test_a_key_in_a_state_is_numbers():
    assert named_state({"key": jax.random.key(7)}, ("a", "b", "c")) == {"key": [0, 7]}


def test_a_states_arrays_over_the_domains_are_named_and_histories_left_out():
    class Fit(NamedTuple):
        slope: np.ndarray
        history: np.ndarray

    state = {"fit": Fit(np.array([1.0, 2.0]), np.zeros((2, 5))), "count": np.int32(3), "last": np.arange(3)}
    assert named_state(state, ["a", "b"]) == {"fit": {"slope": {"a": 1.0, "b": 2.0}}, "count": 3, "last": [0, 1, 2]}
