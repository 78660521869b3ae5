"""Whole runs with adapters: what they leave, exact resume, their base, and their way to PEFT and back."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from dataflex_jax.errors import InputError
from dataflex_jax.models.hf import peft
from dataflex_jax.training import run_config
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.exporting import export_adapter, export_checkpoint
from dataflex_jax.training.imports import import_pretrained
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny
from tests.helpers.command import assert_same_curves

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
BASE_SIZE = 2 * (32 * (32 + 2 * 16 + 32) + 3 * 32 * 64)  # the kernels alone


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def full(root, tmp_path_factory):
    """A run of 2 steps that trains all parameters."""
    folder = tmp_path_factory.mktemp("full")
    train_and_evaluate(tiny.config(root, train_step=2), folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(full, tmp_path_factory):
    """That run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("pretrained") / "base"
    export_checkpoint(full, folder)
    return folder


def recipe(root, base, **fields):
    """Adapters on a pretrained base, with dropout; the batch in two microbatches."""
    settings = {"train_step": 6, "checkpoint_every": 3, "eval_every": 3, "optim__learning_rate": 3e-2}
    settings |= {"lora__rank": 4, "lora__dropout": 0.1, "lora__base_dtype": "float32"}
    config = tiny.config(root, **settings | fields)
    config.model.update(dict.fromkeys((*SHAPE, "tie_word_embeddings", "initializer_range")))
    config.model.update(name_or_path=str(base), from_scratch=False)
    config.data.update(tokenizer=str(base), batch_size=16, grad_accumulation=2)
    return config


@pytest.fixture(scope="module")
def run(root, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(recipe(root, pretrained), folder)
    return folder


def test_only_adapters_are_trained_and_saved(run):
    first, *_, last = tiny.records(run, "metrics.jsonl")
    assert last["loss"] < first["loss"] - 0.05
    saved = ocp.StandardCheckpointer().metadata(run / FOLDER / "6" / "state").item_metadata
    arrays = [leaf.shape for leaf in jax.tree.leaves(saved) if hasattr(leaf, "shape")]
    adapters = 2 * 4 * (3 * (32 + 16) + 16 + 3 * (32 + 64) + 32 + 32)  # 2 layers of rank 4, the seven inputs + outputs
    assert sum(int(np.prod(shape)) for shape in arrays) < 3 * adapters + 100
    assert sum(shape[-2:] == (32, 64) or shape[-1:] == (257,) for shape in arrays) == 0
    assert 3 * adapters + 100 < 3 * BASE_SIZE


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(root, pretrained, run, tmp_path):
    train_and_evaluate(recipe(root, pretrained, train_step=3), tmp_path)
    train_and_evaluate(recipe(root, pretrained), tmp_path)
    assert_same_curves(tmp_path, run)


def test_a_checkpoint_is_evaluated_with_its_base_and_without_dropout(run):
    records = {record["step"]: record["domains"] for record in tiny.records(run, "eval.jsonl")}
    assert tiny.evaluated(run / FOLDER / "3") == records[3]
    assert tiny.evaluated(run / FOLDER / "6") == records[6]
    assert records[3] != records[6]


@pytest.mark.slow
def test_a_run_starts_from_where_training_all_parameters_starts(root, full, tmp_path):
    """Without pretrained weights the base is drawn from the seed."""
    train_and_evaluate(tiny.config(root, train_step=2, lora__rank=2, lora__base_dtype="float32"), tmp_path)
    ours, theirs = (tiny.records(folder, "metrics.jsonl") for folder in (tmp_path, full))
    assert ours[0]["loss"] == theirs[0]["loss"]
    assert ours[1]["loss"] != theirs[1]["loss"]
    assert tiny.evaluated(tmp_path) == tiny.records(tmp_path, "eval.jsonl")[-1]["domains"]


# To other formats and back.


def test_the_merged_export_is_the_adapted_model(root, run, tmp_path):
    export_checkpoint(run, tmp_path / "merged")
    config = recipe(root, tmp_path / "merged", lora__rank=0, optim__learning_rate=0.0)
    config.train_step = 1
    train_and_evaluate(config, tmp_path / "again")
    for name, figures in tiny.evaluated(run).items():
        assert tiny.records(tmp_path / "again", "eval.jsonl")[-1]["domains"][name]["nll"] == pytest.approx(
            figures["nll"], abs=1e-5
        )


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    """The run's adapters as a PEFT folder."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    export_adapter(run, folder)
    return folder


def test_an_exported_adapter_is_imported_bit_for_bit(root, pretrained, run, adapter, tmp_path):
    config, base_name = peft.read_lora_config(str(adapter), "--adapter", "float32")
    assert (config.rank, config.alpha, config.dropout, base_name) == (4, 8.0, 0.1, str(pretrained))
    fresh = tiny.config(root, lora__base_dtype="float32", data__batch_size=16, data__grad_accumulation=2)
    fresh.model.update(dict.fromkeys((*SHAPE, "tie_word_embeddings", "initializer_range")))
    import_pretrained(str(adapter), fresh, tmp_path / "run")
    assert tiny.evaluated(tmp_path / "run", run_config.read(run)) == tiny.evaluated(run)
    export_adapter(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "again" / peft.CONFIG).read_text() == (adapter / peft.CONFIG).read_text()
    before, after = (load_file(folder / peft.WEIGHTS) for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora__rank": 2}, "config.lora.rank = 2: the adapter .* has 4"),
        ({"lora__rank": 0}, "config.lora.rank = 0: must be that of the adapter"),
        ({"lora__target_modules": ("q_proj",)}, r"config.lora.target_modules = \('q_proj',\): the adapter"),
        ({"lora__name_or_path": "/no/such"}, "config.lora.name_or_path = '/no/such'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(root, pretrained, adapter, tmp_path, fields, message):
    config = recipe(root, pretrained, **({"lora__name_or_path": str(adapter)} | fields))
    with pytest.raises(InputError, match=message) as e:
        train_and_evaluate(config, tmp_path)
    assert "\n" not in str(e.value)


# Another base.


@pytest.fixture(scope="module")
def other_base(root, pretrained, tmp_path_factory):
    """Another model of the same shape, and with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    train_and_evaluate(tiny.config(root, None, train_step=1, seed=7), folder / "run")
    export_checkpoint(folder / "run", folder / "base")
    return folder / "base"


@pytest.mark.slow
def test_adapters_do_not_go_on_with_another_base(root, pretrained, other_base, run, adapter, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    message = f"adapters belong to another base, {pretrained} .float32 [0-9a-f]+., not to {other_base} .float32"
    with pytest.raises(InputError, match=message) as e:
        train_and_evaluate(recipe(root, other_base, train_step=9), folder)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="an adapter for another base"):
        train_and_evaluate(recipe(root, other_base, lora__name_or_path=str(adapter)), tmp_path / "new")
    # The same weights elsewhere are the same base.
    moved = shutil.copytree(pretrained, tmp_path / "moved")
    assert train_and_evaluate(recipe(root, moved), folder).step == 6


def test_a_base_that_changed_in_its_place_is_noticed(root, pretrained, other_base, tmp_path):
    base = shutil.copytree(pretrained, tmp_path / "base")
    config = recipe(root, base, train_step=1)
    train_and_evaluate(config, tmp_path / "run")
    shutil.copy(other_base / "model.safetensors", base)
    with pytest.raises(InputError, match="adapters belong to another base"):
        tiny.evaluated(tmp_path / "run")
    with pytest.raises(InputError, match="adapters belong to another base"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 8}, "config.lora.rank = 8: the checkpoint was trained with 4"),
        ({"alpha": 3.0}, "config.lora.alpha = 3.0: the checkpoint was trained with 8.0"),
        ({"target_modules": ("q_proj",)}, r"config.lora.target_modules = \['q_proj'\]: the checkpoint"),
        (
            {"base_dtype": "bfloat16"},
            "config.lora.base_dtype = 'bfloat16': the checkpoint was trained with 'float32'",
        ),
        ({"rank": 0}, "config.lora.rank = None: the checkpoint was trained with 4"),
        ({"target_modules": ("qproj",)}, r"config.lora.target_modules = \('qproj',\): must be .*'q_proj'.*'all'"),
        ({"dropout": 1.0}, "config.lora.dropout = 1.0: must be a number >= 0 and < 1"),
        ({"rank": -1}, "config.lora.rank = -1: must be an integer >= 0"),
    ],
)
def test_other_settings_are_refused_by_name(root, pretrained, run, fields, message):
    config = recipe(root, pretrained, train_step=9)
    config.lora.update(fields)
    with pytest.raises(InputError, match=message) as e:
        train_and_evaluate(config, run)
    assert "\n" not in str(e.value)


def test_a_run_without_adapters_has_none_to_export(full, tmp_path):
    with pytest.raises(InputError, match="has no adapters, all parameters were trained"):
        export_adapter(full, tmp_path / "adapter")
