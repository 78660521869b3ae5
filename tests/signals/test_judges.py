"""Judges: another model with another tokenizer reads the target's conversation, or a text where there is none."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dataflex_jax.data.listed import input_rows
from dataflex_jax.data.sources.instruct import Conversation
from dataflex_jax.data.text.chat import template_text, tuned_with
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.hf.classifier import open_classifier, probability
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.policies.signals import Embeddings, Exchange, Task
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals import judges
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.signals.sweep import Sweeper, source
from tests.models.make_golden import MODELS, classifier_tensors

LIKE = from_hf(MODELS["qwen2_tied"], dtype="float32")
MESH = make_mesh({}, jax.devices()[:1])


def written(folder, template):
    """A judge whose tokenizer has bytes and the control tokens of Qwen's template, and maybe that one."""
    tokenizer = load_tokenizer("bytes", texts=iter, cache_dir=folder, special_tokens=("<|im_start|>", "<|im_end|>"))
    if template:
        tokenizer = tuned_with(tokenizer, template_text("qwen", tokenizer))
    folder.mkdir()
    tokenizer.save(folder)
    table = np.random.RandomState(0).standard_normal((300, 16)).astype(np.float32)
    save_file(classifier_tensors("qwen2_tied") | {"model.embed_tokens.weight": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MODELS["qwen2_tied"] | {"vocab_size": 300}))
    return str(folder)


def by_hand(judge, texts):
    """Its probability of texts that are tokens."""
    classifier = open_classifier(judge, MESH, LIKE, "selector.reward")
    rows, ids = input_rows(texts), np.arange(len(texts))
    swept = SweptRows(
        Subject(classifier.model), Sweeper(MESH, rows=4), source(rows.pool(), MESH), ids, ids * 0, ("a",), "texts"
    )
    return probability(swept.sweep(Embeddings(judges._last)) @ np.asarray(classifier.head))


def exchange(text, response="", reference=""):
    return Exchange(Task(0, "record 3 of 'a'", "", reference), response, text)


def test_texts_without_a_conversation_are_read_with_the_judges_own_tokens(tmp_path):
    judge = written(tmp_path / "judge", template=True)
    texts = [f"a<|im_end|>{'b' * 20}", "", "<other>"]
    expected = [[97, 258, *b"b" * 20], [256], [*b"<other>"]]
    with jax.set_mesh(MESH):
        found = judges.judged(judge, [exchange(text) for text in texts], None, LIKE, Sweeper(MESH, rows=4))
        np.testing.assert_allclose(found, by_hand(judge, expected), rtol=1e-5)
    assert len(set(np.round(found, 4))) == 3


def conversation(*turns):
    roles = ["user", "assistant"] * len(turns)
    return Conversation([{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)])


def test_conversations_are_written_by_the_judges_template(tmp_path):
    judge = written(tmp_path / "judge", template=True)
    chat, said = conversation("hi", "yes"), exchange("[INST] hi [/INST] no", "no", "yes")
    chat.messages.insert(0, {"role": "system", "content": "be short"})
    tokenizer = load_tokenizer(judge, texts=iter, cache_dir=tmp_path)
    rendered = (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    )
    with jax.set_mesh(MESH):
        found = judges.judged(judge, [said], [chat], LIKE, Sweeper(MESH, rows=4))
        np.testing.assert_allclose(found, by_hand(judge, tokenizer.encode_rendered([rendered])), rtol=1e-5)


def test_without_a_template_a_judge_reads_the_text(tmp_path):
    judge = written(tmp_path / "judge", template=False)
    chat, said = conversation("hi", "yes"), exchange("[INST] hi [/INST] no", "no", "yes")
    with jax.set_mesh(MESH):
        found = judges.judged(judge, [said], [chat], LIKE, Sweeper(MESH, rows=4))
        np.testing.assert_allclose(found, by_hand(judge, [list(said.text.encode())]), rtol=1e-5)


@pytest.mark.parametrize(
    ("reference", "before"),
    [
        ("two  times", ["a", "one", "b"]),  # the last response
        ("one", ["a"]),  # the row was cut off after the first
        ("tw", ["a", "one", "b"]),  # and within the second
        ("something else", ["a", "one", "b"]),  # a template may show less than there is
    ],
)
def test_a_response_takes_the_place_of_the_reference(reference, before):
    chat = conversation("a", "one", "b", "two times")
    found = judges.answered(chat, exchange("", "new", reference))
    assert [message["content"] for message in found.messages] == [*before, "new"]


def test_a_conversation_that_the_judges_template_refuses_is_named(tmp_path):
    judge = written(tmp_path / "judge", template=True)
    path = tmp_path / "judge" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "{{ raise_exception('no') }}"}))
    with jax.set_mesh(MESH), pytest.raises(InputError) as error:
        judges.judged(judge, [exchange("")], [conversation("hi", "yes")], LIKE, Sweeper(MESH, rows=4))
    assert str(error.value).startswith(
        f"config.selector.reward = '{judge}': its chat template has no form for record 3"
    )
