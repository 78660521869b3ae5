"""Evaluators: the held-out loss against sums by hand, and one that a plugin brings."""

import importlib.util
import math
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dataflex_jax.configs import base
from dataflex_jax.data.domains import open_domains
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training import evaluation
from dataflex_jax.training.evaluation import EvaluationContext, Evaluator, held_out, register_evaluator
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import policy_runs, tiny

_PLUGIN = """
import jax
import numpy as np
from dataflex_jax.training.evaluation import Evaluator, register_evaluator

@register_evaluator("norms")
def norms(context):
    def run(model):
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(model.whole())))
        groups = {domain.name: {"rows": domain.train.num_rows} for domain in context.domains}
        return {"split": "norms", "domains": groups, "overall": {"norm": norm}}

    return Evaluator("norms", 2, run)

@register_evaluator("silent")
def silent(context):
    return Evaluator("silent", 0, lambda model: {"split": "silent", "domains": {}, "overall": None})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """What it registers is gone afterwards."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "evaluators_of_a_test.py").write_text(_PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setattr(evaluation, "_EVALUATORS", dict(evaluation._EVALUATORS))
    yield {"plugins": ("evaluators_of_a_test",)}
    sys.modules.pop("evaluators_of_a_test", None)


@jax.jit
def row_losses(model, tokens):
    return decoder.token_losses(model.graphdef, model.params, tokens[None]).losses[0]


def test_the_held_out_loss_is_summed_by_domain(root):
    config = policy_runs.config(root, eval_rows=5)
    domains, tokenizer = open_domains(config.data, progress=False)
    model = Model.random(model_config(config.model, tokenizer.vocab_size), jax.random.key(0))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        record = held_out(EvaluationContext(config, domains, tokenizer, mesh)).run(model)
    assert record["split"] == "valid"
    sums = np.zeros(2)
    for domain in domains:
        nll = tokens = 0
        for i in range(5):
            row = domain.valid.row(i)
            nll += float((row_losses(model, row.tokens) * row.mask).sum())
            tokens += int(row.mask.sum())
        figures = record["domains"][domain.name]
        assert figures["tokens"] == tokens
        assert figures["nll"] == pytest.approx(nll / tokens, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        in_bits = nll / math.log(2) / (tokens * domain.valid.bytes_per_target)
        assert figures["bits_per_byte"] == pytest.approx(in_bits, rel=1e-5)
        sums += nll, tokens
    assert record["overall"]["nll"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert record["overall"]["tokens"] == sums[1]


def test_an_evaluator_of_ones_own_runs_as_often_as_it_says(root, plugin, tmp_path):
    fields = {"evaluators": ("norms", "held_out", "silent"), "train_step": 5, "eval_every": 3} | plugin
    train_and_evaluate(policy_runs.config(root, **fields), tmp_path / "run")
    lines = tiny.records(tmp_path / "run", "eval.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        (2, "norms"),
        (3, "valid"),
        (4, "norms"),
        (5, "norms"),
        (5, "valid"),
        (5, "silent"),
    ]
    norms = [line for line in lines if line["split"] == "norms"]
    assert len({line["overall"]["norm"] for line in norms}) == 3
    assert norms[0]["domains"].keys() == tiny.DOMAINS.keys()
    assert lines[-1] == {"step": 5, "split": "silent", "domains": {}, "overall": None}


def test_without_evaluators_nothing_is_evaluated(root, tmp_path):
    train_and_evaluate(policy_runs.config(root, evaluators=(), train_step=1), tmp_path)
    assert tiny.records(tmp_path, "eval.jsonl") == []


def test_an_unknown_evaluator_is_refused_in_one_line(root, tmp_path):
    with pytest.raises(InputError, match=r"^config.evaluators: unknown evaluator 'nope'; known: .*held_out.*") as e:
        train_and_evaluate(policy_runs.config(root / "not read yet", evaluators=("held_out", "nope")), tmp_path)
    assert "\n" not in str(e.value)


def test_two_evaluators_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"evaluator 'held_out' of .* is already registered by dataflex_jax"):
        register_evaluator("held_out")(lambda context: None)
    register_evaluator("held_out")(held_out)  # a module that is imported again


def made_by(monkeypatch, make):
    monkeypatch.setitem(evaluation._EVALUATORS, "mine", make)
    config = ConfigDict({"evaluators": ("mine",), "eval_tasks": ()})
    (made,) = evaluation.evaluators(EvaluationContext(config, (), None, None))
    return made


def measuring(monkeypatch, record):
    return made_by(monkeypatch, lambda context: Evaluator("mine", 0, lambda model: record)).run


RECORD = {"split": "x", "domains": {"a": {"b": np.float32(1)}}, "overall": {"c": 2, "d": jax.numpy.float32(3)}}


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (None, 'a mapping with "split", "domains" and "overall", and without "step"'),
        ({"split": "x", "domains": {}}, 'a mapping with "split", "domains" and "overall", and without "step"'),
        (RECORD | {"step": 9}, 'a mapping with "split", "domains" and "overall", and without "step"'),
        (RECORD | {"split": 3}, '"split" to be a string'),
        (RECORD | {"domains": {"a": 1.0}}, '"domains" to be {group: {metric: number}}'),
        (RECORD | {"overall": {"a": "good"}}, '"overall" to be {metric: number}, or None'),
        (RECORD | {"overall": {"a": np.ones(2)}}, '"overall" to be {metric: number}, or None'),
        (RECORD | {"overall": {"a": [1, [2]]}}, '"overall" to be {metric: number}, or None'),
    ],
)
def test_what_an_evaluator_measures_must_be_a_line(monkeypatch, record, wanted):
    with pytest.raises(InputError) as caught:
        measuring(monkeypatch, record)(None)
    assert str(caught.value).startswith("evaluator 'mine': run returned ")
    assert str(caught.value).endswith(f"; expected {wanted}")
    for right in (RECORD, RECORD | {"overall": None}):
        assert measuring(monkeypatch, right)(None) is right


def test_an_evaluator_that_is_none_or_raises_is_named(monkeypatch):
    for make, line in (
        (lambda context: None, "its factory returned a NoneType; an Evaluator is expected"),
        (lambda context: 1 / 0, "its factory raised ZeroDivisionError: division by zero\n"),
        (lambda context: Evaluator("mine", -1, lambda model: RECORD), "every is -1; expected an integer >= 0"),
        (lambda context: Evaluator("mine", 0, lambda: RECORD), "run is a function of (); expected a function of 1 arg"),
        (lambda context: Evaluator("mine", 0, None), "run is None; expected a function of 1 argument"),
    ):
        with pytest.raises(InputError) as caught:
            made_by(monkeypatch, make)
        assert str(caught.value).startswith(f"evaluator 'mine': {line}")
    run = made_by(monkeypatch, lambda context: Evaluator("mine", 0, lambda model: 1 / 0)).run
    with pytest.raises(InputError, match=r"^evaluator 'mine': run raised ZeroDivisionError: division by zero\n"):
        run(None)
    with pytest.raises(InputError, match="what makes it must be a function of an EvaluationContext"):
        register_evaluator("without arguments")(lambda: None)


class _Tasks:
    """In the place of the harness's, which takes seconds to open them."""

    def __init__(self, settings, tokenizer, mesh):
        self.settings = settings

    def results(self, name, model):
        table = {"acc,none": 0.5, "acc_stderr,none": 0.1, "limit,none": self.settings.limit}
        return {"results": {name: table}, "group_subtasks": {}, "n-samples": {name: {"effective": 4}}}


def test_tasks_of_the_harness_are_evaluators_beside_the_others(monkeypatch):
    monkeypatch.setattr(evaluation.harness, "Tasks", _Tasks)
    config = base.get_config()
    config.update(evaluators=(), eval_tasks=("mmlu", "arc_easy"), eval_tasks_every=7, eval_limit=3)
    mmlu, arc = evaluation.evaluators(EvaluationContext(config, (), None, None))
    assert [(each.name, each.every) for each in (mmlu, arc)] == [("mmlu", 7), ("arc_easy", 7)]
    overall = {"acc": 0.5, "acc_stderr": 0.1, "limit": 3.0, "samples": 4}
    assert arc.run(None) == {"split": "arc_easy", "domains": {}, "overall": overall}


def test_tasks_that_cannot_be_asked_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = base.get_config()
    evaluation.check_evaluators(config)
    config.eval_tasks = ("mmlu",)
    with pytest.raises(InputError, match=r"^config.eval_tasks = \('mmlu',\): needs lm_eval, .*dataflex_jax\[eval\]"):
        evaluation.check_evaluators(config)
