"""Runs that take seconds with policies that weight the loss, by name; see tiny.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dataflex_jax.policies import registry
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import assert_same_curves, copy_of, saved_steps


def config(
    root: Path, mixer: str | None = None, weighter: str | None = None, selector: str | None = None, **fields
) -> ConfigDict:
    """8 steps of a one-layer model with policies by name ("loss+adapt" for two weighters); `fields` as in tiny.py."""
    made = tiny.config(root, mixer)
    made.train_step, made.warmup_step, made.update_step, made.eval_rows = 8, 0, 1, 2
    made.model.update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    made.data.seq_len = 16
    if weighter is not None and "+" in weighter:
        made.weighter = ConfigDict({name: registry.policy_config("weighter", name) for name in weighter.split("+")})
    elif weighter is not None:
        made.weighter = registry.policy_config("weighter", weighter)
    if selector is not None:
        made.selector = registry.policy_config("selector", selector)
    return tiny.having(made, fields)


def train(folder: Path, root: Path, mixer: str | None = None, weighter: str | None = None, **fields) -> Path:
    """Runs `config` to its end in `folder`, which it returns."""
    train_and_evaluate(config(root, mixer, weighter, **fields), folder)
    return folder


def resumable(root: Path, reference: Path, kind: str, name: str, **fields) -> ConfigDict:
    """10 steps with one policy, which decides after each, and checkpoints at 4 and 8.

    Args:
        root: the domains.
        reference: a run for a policy that compares with one.
        kind: of the policy.
        name: of the policy.
        **fields: as in `config`.
    """
    fields = {"train_step": 10, "warmup_step": 1, "checkpoint_every": 4, "eval_every": 4} | fields
    made = config(root, **{kind: name}, **fields)
    if "reference" in made[kind]:
        made[kind].reference = str(reference)
    return made


def some_of(kind: str, *quick: str, without: Sequence[str] = ()) -> list:
    """The names of the policies of a kind but some, for a parameter: those not in `quick` are slow tests."""
    names = [name for name in registry.names(kind) if name not in without]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def assert_goes_on(made: ConfigDict, folder: Path) -> tuple[list[dict], list[dict]]:
    """The curves of a run that is killed after its checkpoint at step 4 are the uninterrupted one's to the bit.

    Returns:
        Its lines of metrics.jsonl and policy.jsonl.
    """
    train_and_evaluate(made, folder / "whole")
    run = copy_of(folder / "whole", folder / "run")
    for later in saved_steps(run):
        if later > 4:
            shutil.rmtree(run / "checkpoints" / str(later))
    train_and_evaluate(made, run)
    assert saved_steps(run)[-1] == made.train_step
    assert_same_curves(run, folder / "whole")
    return tuple(tiny.records(run, name) if (run / name).exists() else [] for name in ("metrics.jsonl", "policy.jsonl"))
