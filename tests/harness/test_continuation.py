"""Generated text up to where a string comes, made in pieces."""

import jax
import pytest

from dataflex_jax import library
from dataflex_jax.harness import continuation
from dataflex_jax.harness.continuation import Continuations, Ending, Sampling
from dataflex_jax.models.generation.generate import generate_texts
from dataflex_jax.sharding import make_mesh

LENGTH = 12


@pytest.fixture(scope="module")
def example():
    model, tokenizer = library.example(initializer_range=0.5)
    prompts = tokenizer.encode_prompts(["Ada", "Grace Hopper", "q", "Turing"])
    whole = generate_texts(model, tokenizer, prompts, max_new_tokens=LENGTH)
    return model, tokenizer, prompts, whole


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(continuation, "_FIRST_TOKENS", 4)
    monkeypatch.setattr(continuation, "_ROWS", 2)


def made(example, until=(), length=LENGTH, sampling=Sampling(), devices=1):  # noqa: B008 - a constant
    model, tokenizer, prompts, _ = example
    mesh = make_mesh({"fsdp": -1}, jax.devices()[:devices])
    return Continuations(mesh).of(model, tokenizer, prompts, Ending(tuple(until), length), sampling)


def test_pieces_are_what_would_have_been_generated_at_once(example):
    assert made(example) == example[3]


def test_texts_end_before_the_first_of_the_strings(example):
    whole = example[3]
    until = [whole[0][6:8], whole[1][2], "never there"]
    expected = [min((text.split(string)[0] for string in until), key=len) for text in whole]
    assert expected != whole
    assert made(example, until) == expected


@pytest.mark.slow
def test_drawn_tokens_differ_from_piece_to_piece_and_not_from_call_to_call(example):
    first, second = (made(example, sampling=Sampling(temperature=1.5)) for _ in range(2))
    assert first == second != example[3]
    assert len({text[:4] for text in first}) > 1
    assert any(text[:4] != text[4:8] for text in first)
