"""A user's own module brings a source, a signal, a selector that asks for it and an evaluator; a run uses all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dataflex_jax import evaluate
from dataflex_jax.data.batch import collated
from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.sources import table
from dataflex_jax.errors import InputError
from dataflex_jax.models.model import Model
from dataflex_jax.policies import registry
from dataflex_jax.signals import registry as signal_registry
from dataflex_jax.training import evaluation
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import tiny, tiny_chat
from tests.helpers.command import PROJECT, assert_same_curves
from tests.runs.test_resume import interrupted_at

PLUGIN = '''
"""Verses, how surprising they are, the most surprising of them, and how bad the worst prediction is."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np

from dataflex_jax.data.loader import held_out_batches
from dataflex_jax.data.sources.parts import RecordsPart
from dataflex_jax.data.sources.streams import Stream, TextReader, wanted_domains
from dataflex_jax.data.sources.table import Source, register_source
from dataflex_jax.policies import Choice, Evidence, Selector, register_selector
from dataflex_jax.signals.registry import register_signal
from dataflex_jax.training.evaluation import Evaluator, register_evaluator

LETTERS = {"odes": "aeiou ", "sonnets": "bcdfgh "}


def records(name):
    letters = random.Random(name)
    return tuple({"text": "".join(letters.choices(LETTERS[name], k=150))} for _ in range(24))


def streams(data):
    return tuple(
        Stream((RecordsPart(name, records(name)),), (), {None: name}, TextReader("text"))
        for name in wanted_domains(data, tuple(LETTERS), "the verses")
    )


register_source(Source("verses", streams, refuses={"root": "they are in memory"}))


@dataclasses.dataclass(frozen=True)
class Surprise:
    """The mean over a row of its token losses to some power, [n]."""

    power: float


@register_signal(Surprise)
def surprise(signal):
    def of_rows(subject, batch, operand):
        losses = subject.model.token_losses(batch).losses
        return jnp.sum(batch.mask * losses**signal.power, axis=1) / batch.row_tokens

    return of_rows


@register_selector("surprising")
def surprising(*, power: float = 1.0) -> Selector:
    def score(state, signals, request):
        return Evidence(jnp.asarray(signals.candidates.sweep(Surprise(power)))), state

    def choose(evidence, request, num):
        ids = jnp.argsort(-evidence.rows)[:num]
        return Choice(ids, evidence.rows[ids], evidence.rows)

    return Selector(score=score, choose=choose)


@register_evaluator("worst")
def worst(context):
    @jax.jit
    def of_batch(model, batch):
        return jnp.max(batch.mask * model.token_losses(batch).losses, axis=1)

    def run(model):
        found = dict.fromkeys([domain.name for domain in context.domains], 0.0)
        names = list(found)
        for batch in held_out_batches(context.domains, context.rows_a_batch, context.config.eval_rows, context.mesh):
            for number, value in zip(np.asarray(batch.domain), np.asarray(of_batch(model, batch)), strict=True):
                found[names[number]] = max(found[names[number]], float(value))
        domains = {name: {"worst_nll": value} for name, value in found.items()}
        return {"split": "worst", "domains": domains, "overall": {"worst_nll": max(found.values())}}

    return Evaluator("worst", 3, run)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The name of the module; what it registers is gone afterwards."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "users_verses_and_more.py").write_text(PLUGIN)
    registry.names("selector")  # The policies that come with the project stay registered.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_SOURCES", dict(table._SOURCES))
        patch.setitem(registry._FACTORIES, "selector", dict(registry._FACTORIES["selector"]))
        patch.setattr(signal_registry, "_MAKERS", dict(signal_registry._MAKERS))
        patch.setattr(evaluation, "_EVALUATORS", dict(evaluation._EVALUATORS))
        patch.syspath_prepend(folder)
        registry.load_plugins(("users_verses_and_more",))
        yield "users_verses_and_more"
        sys.modules.pop("users_verses_and_more")


def config_of(plugin, folder, **fields):
    """Choices after 1 and 3 steps of 6, a checkpoint of every step."""
    made = tiny.config(folder / "nothing", None, plugins=(plugin,), evaluators=("held_out", "worst"))
    made.data.update(source="verses", root=None)
    made.update(train_step=6, warmup_step=1, update_step=2, update_times=2, checkpoint_every=1, keep=9, eval_every=4)
    made.sweep.batch_rows = 16
    options = {"selector__power": 2.0}
    return tiny_chat.with_policies(made, options | fields, selector="surprising")


@pytest.fixture(scope="module")
def run(plugin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        return tiny_chat.trained(config_of(plugin, folder), folder / "run", patch)


@pytest.fixture(scope="module")
def domains(plugin, run):
    return open_domains(config_of(plugin, run.folder.parent).data, progress=False)[0]


def losses_after(run, step, rows):
    """Token losses of rows under the model as it was, and where they count."""
    batch = collated(rows, 32, [0] * len(rows))
    opened = open_model(run.folder / "checkpoints" / str(step))
    with jax.set_mesh(opened.mesh):
        return np.asarray(jax.jit(Model.token_losses)(opened.model, batch).losses), batch.mask


def test_the_run_learns_what_the_source_has(run):
    metrics = tiny.records(run.folder, "metrics.jsonl")
    assert [set(line["domain_epochs"]) for line in metrics] == [{"odes", "sonnets"}] * 6
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


def test_the_selector_takes_what_its_signal_says_of_the_model_as_it_is(run, domains):
    pool = Pool(domains)
    assert [(line["step"], line["policy"]) for line in run.decisions()] == [(1, "surprising"), (3, "surprising")]
    for step, arrays in run.selections().items():
        losses, mask = losses_after(run, step, [pool.row(i) for i in range(pool.num_rows)])
        expected = (mask * losses**2).sum(axis=1) / mask.sum(axis=1)
        np.testing.assert_allclose(arrays["all_scores"], expected, rtol=1e-5)
        best = np.argsort(-arrays["all_scores"], kind="stable")[:16]
        np.testing.assert_array_equal(arrays["ids"], best)
        np.testing.assert_array_equal(np.sort(run.rows[step : step + 2].reshape(-1)), np.sort(best))


def test_the_evaluator_runs_at_its_own_steps_beside_the_held_out_loss(run, domains):
    lines = tiny.records(run.folder, "eval.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        (3, "worst"),
        (4, "valid"),
        (6, "valid"),
        (6, "worst"),
    ]
    for line in (lines[0], lines[-1]):
        worst = {}
        for domain in domains:
            rows = [domain.valid.row(i) for i in range(min(domain.valid.num_rows, 4))]
            losses, mask = losses_after(run, line["step"], rows)
            worst[domain.name] = {"worst_nll": pytest.approx((mask * losses).max(), rel=1e-5)}
        assert line["domains"] == worst
        assert line["overall"]["worst_nll"] == max(found["worst_nll"] for found in line["domains"].values())


def test_the_command_evaluates_it_too(plugin, run):
    folders = (str(PROJECT), str(Path(sys.modules[plugin].__file__).parent))
    result = subprocess.run(
        [sys.executable, "-m", "dataflex_jax.evaluate", f"--checkpoint={run.folder}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    held_out, worst = tiny.records(run.folder, "eval.jsonl")[-2:]
    del worst["step"]
    assert json.loads((run.folder / "evaluation.json").read_text()) == held_out | {"evaluators": {"worst": worst}}
    step = f"Step 6 of {run.folder}"
    assert result.stdout.startswith(f"{step}, held out:\n{evaluate.table(held_out)}\n{step}, worst:\n")
    groups = worst["domains"] | {"overall": worst["overall"]}
    numbers = [[name, f"{figures['worst_nll']:.6g}"] for name, figures in groups.items()]
    assert [line.split() for line in result.stdout.splitlines()[-5:-1]] == [["worst_nll"], *numbers]


def test_it_goes_on_as_if_never_interrupted(plugin, run, tmp_path):
    again = interrupted_at(2, run.folder, tmp_path / "again")
    train_and_evaluate(config_of(plugin, run.folder.parent), again)
    assert_same_curves(again, run.folder)
    tiny_chat.assert_same_selections(again, run.folder)


def test_what_no_plugin_registers_is_refused_by_name(plugin, tmp_path):
    config = config_of(plugin, tmp_path, evaluators=("held_out", "best"))
    message = r"^config.evaluators: unknown evaluator 'best'; known: held_out, worst \(config.plugins adds your own\)$"
    with pytest.raises(InputError, match=message):
        train_and_evaluate(config, tmp_path / "run")
