"""Pretrained weights whose vocabulary grows with the tokenizer's: trained, resumed, exported, compared with."""

import json
import re
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file

from dataflex_jax import library
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.hf.weights import save_pretrained
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.fits import check_vocabulary
from dataflex_jax.training.imports import import_pretrained, imported
from dataflex_jax.training.setup import prepared, train_and_evaluate
from dataflex_jax.training.weights import open_model, vocab_size_of
from tests.helpers import policy_runs, tiny
from tests.helpers.command import assert_same_curves, copy_of

BYTES, TOKENS, ROWS = 257, 262, 384
TAGS = ["<a>", "<b>", "<c>", "<d>", "<e>"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request, tmp_path_factory):
    """A Hugging Face folder with a row for each of 257 tokens and a tokenizer to which five were added.

    Qwen's head is tied to the embedding, Llama's is not.
    """
    folder = tmp_path_factory.mktemp(request.param)
    load_tokenizer("bytes", texts=iter, cache_dir=folder).save(folder / "tokenizer")
    shape = {"architecture": request.param, "tie_word_embeddings": request.param == "qwen2", "vocab_size": BYTES}
    weights, _ = library.example(**shape)
    save_pretrained(folder / "hf", weights.config, weights.params, folder / "tokenizer")
    backend = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    assert backend.add_special_tokens(TAGS) == len(TAGS)
    backend.save(str(folder / "hf" / "tokenizer.json"))
    return folder / "hf"


def config(root, model, **fields):
    """Two steps from the weights, both saved."""
    named = {"model__name_or_path": str(model), "model__from_scratch": False, "data__tokenizer": str(model)}
    return policy_runs.config(root, **named | {"train_step": 2, "checkpoint_every": 1} | fields)


def growing(root, model, **fields):
    return config(root, model, model__resize_vocab=True, **fields)


def refused(config, folder):
    """The line that refuses it."""
    with pytest.raises(InputError) as error, prepared(config, folder / "run"):
        pass
    return str(error.value)


def tables(params):
    """[V, D] of the embedding and, where there is one, the head."""
    head = [params["lm_head"]["kernel"].T] if "lm_head" in params else []
    return [np.asarray(table) for table in [params["embed_tokens"]["embedding"], *head]]


def test_without_the_option_the_message_says_what_to_set(root, model, tmp_path):
    message = refused(config(root, model, model__vocab_size=ROWS), tmp_path)
    assert re.search(r"has 262 tokens, .* vocab_size is 257; set config.model.resize_vocab=True", message)
    assert "config.model.vocab_size" not in message
    message = refused(config(root, model, model__from_scratch=True), tmp_path)
    assert re.search(r"vocab_size is 257; set config.model.vocab_size to at least 262 or choose", message)
    with prepared(config(root, model, model__from_scratch=True, model__vocab_size=TOKENS), tmp_path) as (_, state, _):
        assert tables(state.params)[0].shape[0] == TOKENS


@pytest.mark.parametrize(
    ("fields", "rows"), [({}, ROWS), ({"model__vocab_size": TOKENS}, TOKENS), ({"model__vocab_size": 300}, 300)]
)
def test_new_rows_are_added_to_the_weights(root, model, tmp_path, fields, rows):
    before = tables(open_model(model).model.params)
    with prepared(growing(root, model, **fields), tmp_path) as (job, state, _):
        assert job.model(state.params).config.vocab_size == rows
        after = tables(state.params)
    for old, new in zip(before, after, strict=True):
        assert new.shape == (rows, old.shape[1])
        np.testing.assert_array_equal(new[:BYTES], old)
        np.testing.assert_allclose(new[BYTES:], np.broadcast_to(old.mean(0), (rows - BYTES, old.shape[1])), atol=1e-6)


def test_a_vocabulary_only_grows(root, model, tmp_path):
    message = refused(growing(root, model, model__vocab_size=260), tmp_path / "small")
    assert "the tokenizer has 262 tokens, but the model's vocab_size is 260" in message
    with prepared(growing(root, model, data__tokenizer="bytes"), tmp_path / "enough") as (_, state, _):
        assert tables(state.params)[0].shape[0] == BYTES


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_grown_model_is_trained_resumed_exported_and_compared_with(root, model, tmp_path):
    run, hf = tmp_path / "run", tmp_path / "hf"
    train_and_evaluate(growing(root, model), run)
    resumed = copy_of(run, tmp_path / "resumed")
    shutil.rmtree(resumed / FOLDER / "2")
    train_and_evaluate(growing(root, model), resumed)
    assert_same_curves(resumed, run, ("metrics.jsonl", "eval.jsonl"))

    export_checkpoint(run, hf)
    assert json.loads((hf / "config.json").read_text())["vocab_size"] == ROWS
    assert transformers.AutoConfig.from_pretrained(hf).vocab_size == ROWS
    written = load_file(hf / "model.safetensors")
    assert written["model.embed_tokens.weight"].shape[0] == ROWS
    opened = open_model(run)
    for ours, theirs in zip(tables(opened.model.params), tables(open_model(hf).model.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (vocab_size_of(str(run)), vocab_size_of(str(hf)), vocab_size_of(str(model))) == (ROWS, ROWS, BYTES)
    check_vocabulary(str(run), opened.tokenizer)

    for source in (run, hf):
        fields = {"mixer__reference": str(source), "data__tokenizer": str(model)}
        with prepared(policy_runs.config(root, "doremi", **fields), tmp_path / f"proxy of {source.name}"):
            pass
    with prepared(config(root, run, data__tokenizer=str(model)), tmp_path / "on") as (_, state, _):
        np.testing.assert_array_equal(tables(state.params)[0], tables(opened.model.params)[0])


def test_a_reference_without_rows_for_all_tokens_is_refused(root, model, tmp_path):
    fields = {"mixer__reference": str(model), "data__tokenizer": str(model)}
    expected = rf"^config.mixer.reference = '{model}': the tokenizer has 262 tokens, .* --import_from={model} .*resize"
    assert re.match(expected, refused(policy_runs.config(root, "doremi", **fields), tmp_path))


def test_the_way_out_of_the_message_works(root, model, tmp_path):
    made = policy_runs.config(root, model__resize_vocab=True)
    import_pretrained(str(model), made, tmp_path / "imported")
    opened = open_model(tmp_path / "imported")
    assert opened.model.config.vocab_size == ROWS
    check_vocabulary(str(tmp_path / "imported"), opened.tokenizer)
    with pytest.raises(InputError, match=r"^--checkpoint=.*: the tokenizer has 262 tokens"):
        check_vocabulary(str(model), opened.tokenizer)


def test_a_run_grows_too(root, model, tmp_path):
    imported(config(root, model, data__tokenizer="bytes"), tmp_path / "run")
    with prepared(growing(root, tmp_path / "run", data__tokenizer=str(model)), tmp_path / "grown") as (_, state, _):
        grown = tables(state.params)
    for old, new in zip(tables(open_model(tmp_path / "run").model.params), grown, strict=True):
        assert new.shape[0] == ROWS
        np.testing.assert_array_equal(new[:BYTES], old)


def test_new_rows_that_would_not_be_trained_are_refused(root, model, tmp_path):
    tied = "lm_head.weight" not in load_file(model / "model.safetensors")
    for fields in ({"lora__rank": 2}, {"model__trainable": ("layers/*",)}):
        message = refused(growing(root, model, **fields), tmp_path / "refused")
        assert message.startswith(
            "config.model.trainable: config.model.resize_vocab adds rows to embed_tokens/embedding"
        )
    named = ("embed_tokens/*",) if tied else ("embed_tokens/*", "lm_head/*")
    imported(growing(root, model, lora__rank=2, model__trainable=named), tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert vocab_size_of(str(tmp_path / "hf")) == ROWS
