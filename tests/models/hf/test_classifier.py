"""Classifiers: the logits of transformers, live where torch is installed, and checkpoints that are none."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dataflex_jax.data.listed import input_rows
from dataflex_jax.errors import InputError
from dataflex_jax.models.hf.classifier import open_classifier, probability
from dataflex_jax.models.hf.config import from_hf
from dataflex_jax.policies.signals import Embeddings
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals import judges
from dataflex_jax.signals.registry import Subject
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.signals.sweep import Sweeper, source
from tests.models.make_golden import (
    CLASSIFIERS,
    GOLDEN,
    MODELS,
    classified_texts,
    classifier_tensors,
    torch_classifications,
    torch_classifier,
)

LIKE = from_hf(MODELS["qwen2_tied"], dtype="float32")
OPTION = "selector.reward"


def written(folder, name, tensors=None, **fields):
    """A checkpoint without a tokenizer."""
    folder.mkdir()
    save_file(classifier_tensors(name) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MODELS[name] | fields))
    return folder


def logits_of(folder, name, mesh):
    """Of `classified_texts`, through a sweep."""
    classifier = open_classifier(str(folder), mesh, LIKE, OPTION)
    rows = input_rows(classified_texts(from_hf(MODELS[name])))
    ids = np.arange(rows.num_rows)
    asked = SweptRows(
        Subject(classifier.model), Sweeper(mesh, rows=4), source(rows.pool(), mesh), ids, ids * 0, ("a",), "texts"
    )
    return asked.sweep(Embeddings(judges._last)) @ np.asarray(classifier.head)


@pytest.mark.parametrize("name", [n if n == "qwen3" else pytest.param(n, marks=pytest.mark.slow) for n in CLASSIFIERS])
def test_logits_are_those_of_transformers(name, tmp_path):
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = logits_of(written(tmp_path / "judge", name), name, mesh)
    np.testing.assert_allclose(found, np.load(GOLDEN / "classifiers.npz")[name], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_checkpoint_of_transformers_is_read(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch_classifier("llama3").save_pretrained(tmp_path / "judge", max_shard_size="8KB")
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = logits_of(tmp_path / "judge", "llama3", mesh)
    np.testing.assert_allclose(found, torch_classifications("llama3"), rtol=0, atol=2e-5)


def test_the_probability_is_of_the_last_label():
    np.testing.assert_allclose(probability(jnp.array([[0.0], [2.0]])), [0.5, 1 / (1 + np.exp(-2))], rtol=1e-6)
    np.testing.assert_allclose(probability(jnp.array([[0.0, 0.0, np.log(2)]])), [0.5], rtol=1e-6)


def refusal(folder):
    with pytest.raises(InputError) as error:
        open_classifier(str(folder), make_mesh({}, jax.devices()[:1]), LIKE, OPTION)
    return str(error.value)


def test_a_language_model_is_no_judge(tmp_path):
    tensors = classifier_tensors("llama3")
    del tensors["score.weight"]
    said = refusal(written(tmp_path / "judge", "llama3", tensors))
    assert said.startswith(f"config.selector.reward = '{tmp_path}/judge': ")
    assert "has no tensor 'score.weight', the head of a sequence-classification checkpoint" in said


def test_a_head_of_another_width_is_refused(tmp_path):
    tensors = classifier_tensors("llama3") | {"score.weight": np.zeros((1, 3), np.float32)}
    assert "tensor 'score.weight' has shape [1, 3]; [labels, 16] is needed" in refusal(
        written(tmp_path / "judge", "llama3", tensors)
    )


def test_another_family_is_refused(tmp_path):
    said = refusal(written(tmp_path / "judge", "llama3", model_type="deberta-v2"))
    assert said.startswith(f"{tmp_path}/judge/config.json: ")
    assert "'deberta-v2'" in said
    assert "qwen2" in said


def test_no_checkpoint_is_refused(tmp_path):
    assert refusal(tmp_path / "nothing").startswith(f"config.selector.reward = '{tmp_path}/nothing': no such folder")
