"""What must fit together before a run begins."""

import dataclasses
import shutil
import sys

import pytest

from dataflex_jax import library
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.config import RopeScaling
from dataflex_jax.models.hf.weights import save_pretrained
from dataflex_jax.training import fits
from dataflex_jax.training.imports import import_pretrained, imported
from dataflex_jax.training.setup import prepared, train_and_evaluate
from tests.helpers import policy_runs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name of a tokenizer: a Hugging Face folder of a model with it}"""
    made = {}
    weights, _ = library.example()
    for spec in ("bytes", "train:300"):
        folder = tmp_path_factory.mktemp("model")
        tokenizer = load_tokenizer(spec, texts=lambda: iter(["abc abc 1999"] * 9), cache_dir=folder)
        tokenizer.save(folder / "tokenizer")
        save_pretrained(folder / "hf", weights.config, weights.params, folder / "tokenizer")
        made[spec] = folder / "hf"
    return made


def config(source, tokenizer, **fields):
    named = {"model__name_or_path": str(source), "model__from_scratch": False, "data__tokenizer": str(tokenizer)}
    return policy_runs.config(source.parent / "no data", **named | fields)


def test_bytes_for_weights_that_know_other_tokens_are_refused_before_any_data_are_read(models, tmp_path):
    source = models["train:300"]
    expected = rf"^config.data.tokenizer = 'bytes': the weights of {source} were trained with other tokens; leave"
    with pytest.raises(InputError, match=expected), prepared(config(source, "bytes"), tmp_path):
        pass


def test_wandb_that_is_missing_is_said_before_any_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    wanted = policy_runs.config(tmp_path / "no data", wandb_project="mine")
    with pytest.raises(InputError, match=r"^config.wandb_project = 'mine': wandb is not installed"):
        train_and_evaluate(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bytes_for_weights_without_a_tokenizer_are_refused(models, tmp_path):
    source = shutil.copytree(models["bytes"], tmp_path / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    with pytest.raises(InputError, match=r"^config.data.tokenizer = 'bytes': the weights have no tokenizer that says"):
        fits.check_tokenizer(config(source, "bytes"))


def test_bytes_for_weights_that_know_bytes_are_accepted(models, tmp_path):
    """Of a Hugging Face folder, and of a run."""
    source = models["bytes"]
    fits.check_tokenizer(config(source, "bytes"))
    imported(config(source, "bytes"), tmp_path / "run")
    fits.check_tokenizer(config(tmp_path / "run", "bytes"))
    fits.check_tokenizer(config(models["train:300"], models["train:300"]))


def test_an_import_reads_no_data_and_no_recipe_of_them(models, tmp_path):
    made = policy_runs.config(tmp_path / "nowhere", data__source="dataset_info", data__domains=("a", "b"))
    import_pretrained(str(models["bytes"]), made, tmp_path / "run")
    assert library.open_model(tmp_path / "run").tokenizer.vocab_size == 257


@pytest.mark.parametrize(("longest", "said"), [(64, False), (65, True)])
def test_rows_beyond_the_positions_of_pretrained_weights_are_said(models, caplog, longest, said):
    model, _ = library.example(max_position_embeddings=64, architecture="llama")
    pretrained = config(models["bytes"], "bytes")
    fits.warn_of_long_rows(pretrained, model.config, longest)
    assert len(caplog.records) == said
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    fits.warn_of_long_rows(pretrained, dataclasses.replace(model.config, rope_scaling=scaling), longest)
    assert ("made for 64 (max_position_embeddings, stretched from 16)" in caplog.text) == said
    caplog.clear()
    pretrained.model.from_scratch = True
    fits.warn_of_long_rows(pretrained, model.config, longest)
    assert not caplog.records


def test_a_model_larger_than_all_memory_is_refused_before_it_is_made():
    model, _ = library.example()
    fits.check_memory(model.config)
    absurd = dataclasses.replace(model.config, hidden_size=1 << 16, num_hidden_layers=1 << 12)
    with pytest.raises(InputError, match=r"^config.model: [\d,]+ parameters take [\d,.]+ GB in float32, and all dev"):
        fits.check_memory(absurd)
