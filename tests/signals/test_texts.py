"""Another model over texts: an embedding checkpoint against transformers."""

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies.common.pooling import last_token
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.sweep import Sweeper
from dataflex_jax.signals.texts import TextModel
from dataflex_jax.training.weights import How, open_model
from tests.helpers import embedding_model
from tests.helpers.embedding_model import TEXTS
from tests.models.make_golden import GOLDEN

HOW = How(dtype="float32", remat="none", head=False)
EXPECTED = np.load(GOLDEN / "qwen3_embedding.npz")["embeddings"]


def last(model, batch):
    return last_token(model.hidden_states(batch), batch.real_inputs)


def opened(folder, *, rows=None):
    found = open_model(folder, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), how=HOW)
    return TextModel(found.model, found.tokenizer, Sweeper(found.mesh, rows=rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return embedding_model.write(tmp_path_factory.mktemp("embedding") / "model")


@pytest.fixture(scope="module")
def texts(folder):
    return opened(folder)


def test_equals_transformers(texts):
    np.testing.assert_allclose(texts.of_texts(last, TEXTS, "embeddings"), EXPECTED, atol=1e-5)


def test_live_transformers_say_the_same(folder):
    pytest.importorskip("torch")
    np.testing.assert_allclose(embedding_model.by_transformers(folder), EXPECTED, atol=1e-5)


def test_a_text_is_embedded_the_same_beside_a_longer_one(texts):
    for text, expected in zip(TEXTS, texts.of_texts(last, TEXTS, "together"), strict=True):
        np.testing.assert_allclose(texts.of_texts(last, [text], "alone")[0], expected, atol=1e-6)


def test_a_long_text_is_cut_before_its_end_of_text(texts):
    long = "x" * (2 * texts.longest)
    (encoded,) = texts.tokenizer.encode_whole([long], texts.longest)
    (end,) = texts.tokenizer.encode_whole([""], texts.longest)
    assert len(encoded) == texts.longest
    assert encoded[-1:] == end
    cut = texts.of_texts(last, [long, long[: texts.longest - 1]], "embeddings")
    np.testing.assert_array_equal(cut[0], cut[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix": "model.", "heads": ("lm_head.weight",), "tie_word_embeddings": False},
        {"prefix": "model.", "heads": ("score.weight",), "architectures": ["Qwen3ForSequenceClassification"]},
        {"architectures": ["Qwen3Model"], "tie_word_embeddings": False},
    ],
)
def test_other_ways_to_save_the_same_model(tmp_path, fields):
    found = opened(embedding_model.write(tmp_path / "model", **fields)).of_texts(last, TEXTS[:2], "embeddings")
    np.testing.assert_allclose(found, EXPECTED[:2], atol=1e-5)


def test_a_model_of_another_family_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"config.json: model model_type='bert' is not supported; accepted: .*qwen3"):
        opened(embedding_model.write(tmp_path / "model", model_type="bert"))


def test_a_model_that_looks_ahead_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"config.json: model is_causal=False is not supported; accepted: True"):
        opened(embedding_model.write(tmp_path / "model", is_causal=False))
