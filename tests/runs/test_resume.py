"""Going on exactly with a mixer that lives elsewhere; what may change between two starts and what may not."""

import itertools
import shutil

import numpy as np
import pytest

from dataflex_jax.data import sampler
from dataflex_jax.errors import InputError
from dataflex_jax.training import resume
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import Trainer, assert_same_curves, copy_of, saved_steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


def interrupted_at(step: int, whole, folder):
    """A copy of a finished run as a kill after the checkpoint of `step` leaves it: later lines, no later checkpoint."""
    run = copy_of(whole, folder)
    for later in saved_steps(run):
        if later > step:
            shutil.rmtree(run / "checkpoints" / str(later))
    return run


PLUGIN = '''
"""Prefers the domain whose loss fell the most: a mixer of a user's own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dataflex_jax.policies import base, registry


class State(NamedTuple):
    weights: jax.Array
    last_loss: jax.Array
    progress: jax.Array


@registry.register_mixer("progress")
def progress(*, temperature: float = 0.5) -> base.Mixer:
    def init(proportions):
        return State(proportions, jnp.zeros_like(proportions), jnp.zeros_like(proportions))

    def update(state, observation):
        seen = (observation.domain_rows > 0) & (state.last_loss > 0)
        fell = jnp.where(seen, state.last_loss - observation.domain_loss, state.progress)
        loss = jnp.where(observation.domain_rows > 0, observation.domain_loss, state.last_loss)
        return State(jax.nn.softmax(fell / temperature), loss, fell)

    return base.Mixer(init=init, update=update, sampling_weights=lambda state: state.weights)
'''


def test_a_mixer_of_another_package_trains_and_goes_on(tmp_path):
    """The project is not touched: forty lines in the user's package, and its name on the command line."""
    assert PLUGIN.count("\n") <= 40
    (tmp_path / "theirs" / "their_mixers").mkdir(parents=True)
    (tmp_path / "theirs" / "their_mixers" / "__init__.py").write_text(PLUGIN)
    (tmp_path / "trainer").mkdir()
    trainer = Trainer(tmp_path / "trainer")
    tiny_model = [
        f"--config.model.{field}={value}"
        for field, value in {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}.items()
    ] + ["--config.model.num_attention_heads=4", "--config.model.num_key_value_heads=2"]
    options = {
        "config": "configs/base.py:mixer=progress,plugins=their_mixers",
        "PYTHONPATH": str(tmp_path / "theirs"),
    }
    arguments = [
        *tiny_model,
        *("--config.data.source=local", f"--config.data.root={trainer.root}", "--config.data.tokenizer=bytes"),
        *(f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.seq_len=32", "--config.data.batch_size=8"),
        *("--config.train_step=8", "--config.checkpoint_every=4", "--config.log_every=1", "--config.tensorboard=False"),
        "--config.mixer.temperature=0.1",
    ]
    trainer.done(*arguments, workdir=tmp_path / "whole", **options)
    policy = tiny.records(tmp_path / "whole", "policy.jsonl")
    assert {line["policy"] for line in policy} == {"progress"}
    drawn = [line["observed"]["drawn_with"] for line in policy]
    assert drawn[-1] != drawn[0]
    assert drawn[-1] == pytest.approx(policy[-3]["sampling_weights"])

    run = interrupted_at(4, tmp_path / "whole", tmp_path / "run")
    trainer.done(*arguments, workdir=run, **options)
    assert_same_curves(run, tmp_path / "whole")


FIELDS = {"model.hidden_size": 32, "data.tokenizer": "3f2a", "seed": 1, "mixer.name": "odm"}
IDENTITY = resume.Identity(FIELDS, {"a": "key a", "b": "key b"}, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"fields": FIELDS | {"seed": 2}}, "config.seed = 2: the checkpoint was trained with 1"),
        ({"fields": FIELDS | {"mixer.name": None}}, "config.mixer.name = None: .* with 'odm'"),
        (
            {"fields": FIELDS | {"data.tokenizer": "77e0"}},
            "config.data.tokenizer: its tokens are not those that the che",
        ),
        ({"fields": FIELDS | {"model.new": 3}}, "config.model.new = 3: .* with None"),
        ({"stores": {"a": "key a", "b": "other"}}, "domain 'b': its text, tokenizer, .* or held-out split is not what"),
    ],
)
def test_the_first_mismatch_is_named(now, message):
    position = resume.Position(sampler.SamplerState(3, np.array([5, 6]), np.array([0.5, 0.5])), 100, np.array([7, 4]))
    saved = resume.to_json(IDENTITY, position)
    resume.check(saved, IDENTITY)
    resume.check(saved, IDENTITY._replace(stores=IDENTITY.stores | {"c": "new"}, initial_weights={}))
    with pytest.raises(InputError, match=message):
        resume.check(saved, IDENTITY._replace(**now))


def test_a_shorter_lag_lets_the_newer_decision_win(root, tmp_path):
    """Weights that an earlier start published for later than the new ones are never drawn with."""
    options = {"update_step": 1, "warmup_step": 1, "checkpoint_every": 4}
    train_and_evaluate(tiny.config(root, train_step=4, data__lag=3, **options), tmp_path)
    train_and_evaluate(tiny.config(root, train_step=8, data__lag=0, **options), tmp_path)
    policy = tiny.records(tmp_path, "policy.jsonl")
    assert [line["effective_step"] for line in policy] == [5, 6, 7, 8, 6, 7, 8, 9]
    for before, line in itertools.pairwise(policy[4:]):
        assert line["observed"]["drawn_with"] == pytest.approx(before["sampling_weights"])
    assert policy[4]["observed"]["drawn_with"] == pytest.approx(policy[0]["sampling_weights"])
