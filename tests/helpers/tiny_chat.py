"""Runs that take seconds with selectors and orders: two tiny sets of questions, and what a run really trained on."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dataflex_jax import train
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.targets import open_targets
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.layout import param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.policies import registry
from dataflex_jax.signals.moments import AdamState
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import ModelSignals
from dataflex_jax.signals.sweep import Sweeper, source
from dataflex_jax.training import assembly, optim
from tests.helpers import tiny

SIZES = {"capitals": 44, "digits": 34}


def write_questions(folder: Path) -> Path:
    """NAME.jsonl of alpaca records with a number `difficulty` and a text `kind`, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        rng = random.Random(name)
        lines = []
        for i in range(size):
            word = "".join(rng.choices("abcdefgh" if name == "capitals" else "0123456789", k=rng.randint(3, 9)))
            answer = word.upper() if name == "capitals" else word[::-1]
            record = {"instruction": f"{word}?", "output": answer, "difficulty": rng.random(), "kind": "ab"[i % 2]}
            lines.append(json.dumps(record) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def with_policies(config: ConfigDict, fields: dict, **policies: str | None) -> ConfigDict:
    """`config` with policies by kind, and fields by dotted names with "__" for the dot."""
    for kind, name in policies.items():
        if name is not None:
            config[kind] = registry.policy_config(kind, name)
    if config.selector and "proj_dim" in config.selector:
        config.selector.proj_dim = 32
    for name, value in fields.items():
        *path, field = name.split("__")
        section = config
        for part in path:
            section = section[part]
        section[field] = value
    return config


def config(root: Path, *, selector=None, order=None, mixer=None, weighter=None, **fields) -> ConfigDict:
    """A run of 7 steps on `write_questions`' data, with decisions after 1 and 3 steps."""
    made = tiny.config(root, None)
    made.train_step, made.warmup_step, made.update_step, made.update_times = 7, 1, 2, 2
    made.checkpoint_every = 3
    made.model.update(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    made.data.update(formatting="alpaca", template="mistral", cutoff_len=48, buckets=(48,))
    made.sweep.batch_rows = 16  # so that all sweeps have one shape
    return with_policies(made, fields, selector=selector, order=order, mixer=mixer, weighter=weighter)


def documents(root: Path, *, selector=None, order=None, mixer=None, weighter=None, **fields) -> ConfigDict:
    """The same on `tiny.write_domains`' rows of documents."""
    made = config(root)
    made.data.update(formatting=None, template=None, seq_len=48)
    return with_policies(made, fields, selector=selector, order=order, mixer=mixer, weighter=weighter)


class Run(NamedTuple):
    """A run's folder, how it ended, and the pool's rows that it trained on, [steps, B]."""

    folder: Path
    outcome: object
    rows: np.ndarray

    def selections(self) -> dict[int, dict[str, np.ndarray]]:
        """Step -> arrays of the selection's file."""
        return selections(self.folder)

    def decisions(self) -> list[dict]:
        """The lines of policy.jsonl that are no mixer's."""
        return [line for line in tiny.records(self.folder, "policy.jsonl") if "observed" not in line]


def selections(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Step -> arrays of the selection's file."""
    paths = sorted((folder / "selections").glob("*.npz"))
    return {int(path.stem.removeprefix("step_")): dict(np.load(path)) for path in paths}


def trained(config: ConfigDict, folder: Path, monkeypatch) -> Run:
    """Runs a configuration and notes what the training loader is asked for."""
    asked = []

    class Spy(Loader):
        def load(self, ids, drawn_with):
            asked.append(ids)
            return super().load(ids, drawn_with)

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "Loader", Spy)
        outcome = train.train_and_evaluate(config, folder)
    return Run(folder, outcome, np.array(asked))


def assert_same_selections(folder: Path, reference: Path) -> None:
    """The files are there for the same steps and hold the same arrays, to the bit."""
    ours, expected = selections(folder), selections(reference)
    assert ours.keys() == expected.keys()
    for step, arrays in expected.items():
        assert ours[step].keys() == arrays.keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(ours[step][name], values, err_msg=f"{name} after {step} steps")


def model_signals(config: ConfigDict, domains, tokenizer, mesh: Mesh, *, rows=16, change=lambda x: x) -> ModelSignals:
    """Those of a random model after `change` of its parameters, with an Adam state as in the middle of training."""
    model = Model.shape(model_config(config.model, tokenizer.vocab_size))

    def create(key):
        return change(Model.random(model.config, key).params)

    shardings = param_shardings(mesh, jax.eval_shape(create, jax.random.key(1)))
    params = jax.jit(create, out_shardings=shardings)(jax.random.key(1))
    state = optim.adamw(config.optim, optim.learning_rate(config.optim, 10)).init(params)
    state = jax.tree.map(lambda leaf: leaf + 1e-3 if leaf.ndim else leaf, state)
    subject = Subject(model.having(params), AdamState(state, config.optim.b1, config.optim.b2, config.optim.eps))
    targets = open_targets(config, domains, config.data.tokenizer)
    return ModelSignals(
        subject, Sweeper(mesh, rows=rows), source(Pool(domains), mesh), (targets, source(targets.pool, mesh))
    )
