"""The likelihood of continuations, against one text at a time with all its logits."""

import dataclasses

import jax
import numpy as np
import pytest

from dataflex_jax.harness import plan
from dataflex_jax.harness.likelihood import Likelihoods
from dataflex_jax.models import layout
from dataflex_jax.models.decoder import hidden_states, output_weight
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import make_mesh
from tests.helpers.tiny_model import MODEL, build, created

MAX_LENGTH = 40
KINDS = {"window": {"sliding_window": 7}, "untied": {"tie_word_embeddings": False, "num_key_value_heads": 1}}


def requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Choices of one token and of several after questions that share examples, and texts that share nothing."""
    rng = np.random.default_rng(seed)

    def tokens(least, most):
        return rng.integers(1, MODEL.vocab_size, rng.integers(least, most + 1)).tolist()

    asked = [(tokens(1, 60), tokens(1, 6)) for _ in range(4)]
    for _ in range(2):
        examples = tokens(20, 25)
        for _ in range(3):
            question = examples + tokens(3, 8)
            asked += [(question, [choice]) for choice in (1, 2, 3, 4)] + [(question, tokens(2, 5)) for _ in range(3)]
    asked.append((asked[0][0], asked[0][1] + [5, 6]))  # goes on where another ends
    return asked


@jax.jit
def logits(model: Model, tokens: jax.Array) -> jax.Array:
    params = model.whole()
    hidden, _ = hidden_states(model.graphdef, params, tokens[None])
    return hidden[0] @ output_weight(params)


def log_probs(model: Model, read: list[int]) -> np.ndarray:
    """Of the token after each of those that are read, float64, from all logits."""
    padded = np.zeros(MAX_LENGTH, np.int32)
    padded[: len(read)] = read
    rows = np.asarray(logits(model, padded), np.float64)[: len(read)]
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def one_by_one(model: Model, asked: list) -> list[tuple[float, bool]]:
    """Every request by itself, cut off as the harness cuts."""
    answers = []
    for context, continuation in asked:
        read = (context + continuation)[-(MAX_LENGTH + 1) :][:-1]
        rows = log_probs(model, read)[-len(continuation) :]
        total = rows[np.arange(len(continuation)), continuation].sum()
        answers.append((total, bool((rows.argmax(-1) == continuation).all())))
    return answers


def greedy_ones(model: Model, asked: list) -> list:
    """The requests, of which every third has the continuation of one token that greedy decoding gives."""
    best = {}
    for i in range(0, len(asked), 3):
        context = asked[i][0]
        best[i] = (context, [int(log_probs(model, context[-MAX_LENGTH:])[-1].argmax())])
    return [best.get(i, request) for i, request in enumerate(asked)]


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        pytest.param("adapters", marks=pytest.mark.slow),
        "window",
        pytest.param("untied", marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_one_text_at_a_time(kind, monkeypatch):
    model = build() if kind == "adapters" else created(dataclasses.replace(MODEL, **KINDS.get(kind, {})))
    monkeypatch.setattr(plan, "_WORTH", 0)
    asked = greedy_ones(model, requests())
    expected = one_by_one(model, asked)
    answers = Likelihoods(make_mesh({}, jax.devices()[:1]), tokens=256).of(model, asked, MAX_LENGTH)
    np.testing.assert_allclose([a.log_prob for a in answers], [total for total, _ in expected], atol=1e-4)
    assert [a.greedy for a in answers] == [greedy for _, greedy in expected]
    assert 0 < sum(a.greedy for a in answers) < len(answers)


@pytest.mark.parametrize(
    "axes", [pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow), {"fsdp": 8}]
)
def test_answers_are_the_same_on_many_devices(axes, monkeypatch):
    monkeypatch.setattr(plan, "_WORTH", 0)
    model, asked, mesh = created(MODEL), requests(), make_mesh(axes)
    split = jax.device_put(model, layout.param_shardings(mesh, model))
    one = Likelihoods(make_mesh({}, jax.devices()[:1])).of(model, asked, MAX_LENGTH)
    many = Likelihoods(mesh, tokens=32).of(split, asked, MAX_LENGTH)
    np.testing.assert_allclose([a.log_prob for a in many], [a.log_prob for a in one], atol=1e-5)
    assert [a.greedy for a in many] == [a.greedy for a in one]


def test_of_tokens_that_are_equally_likely_the_first_is_greedy():
    zero = jax.tree.map(np.zeros_like, created(MODEL))
    answers = Likelihoods(make_mesh({}, jax.devices()[:1])).of(zero, [([1], [0]), ([1], [1])], MAX_LENGTH)
    assert [a.greedy for a in answers] == [True, False]
    np.testing.assert_allclose([a.log_prob for a in answers], -np.log(MODEL.vocab_size), rtol=1e-6)
