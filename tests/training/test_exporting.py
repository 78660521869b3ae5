"""Export and import of run folders, and training that starts from pretrained weights."""

import re
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file

from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models.hf import folders
from dataflex_jax.models.hf.resolve import model_config
from dataflex_jax.policies import registry
from dataflex_jax.training import run_config
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.imports import import_pretrained
from dataflex_jax.training.setup import train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import tiny, tiny_chat
from tests.helpers.command import assert_same_curves


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of 4 steps; its tokenizer splits digits in another way than Qwen's, which AutoTokenizer would choose."""
    folder = tmp_path_factory.mktemp("trained")
    train_and_evaluate(tiny.config(root, train_step=4, data__tokenizer="train:300"), folder)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """That run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported")
    export_checkpoint(trained, folder)
    return folder


def recipe(root, **fields):
    """Three steps; its shape is for random weights."""
    return tiny.config(root, train_step=3, model__hidden_size=64, model__num_hidden_layers=1, **fields)


def from_pretrained(root, folder, **fields):
    """The recipe with what a pretrained model needs."""
    config = recipe(root, data__tokenizer=str(folder), **fields)
    config.model.update(name_or_path=str(folder), from_scratch=False)
    return config


def test_training_starts_from_the_weights(root, trained, exported, tmp_path):
    config = from_pretrained(root, exported, optim__learning_rate=0.0)
    config.data.tokenizer = None  # that of the weights
    train_and_evaluate(config, tmp_path)
    assert run_config.read(tmp_path).data.tokenizer == str(exported)
    scores = tiny.records(tmp_path, "eval.jsonl")[-1]
    assert scores["domains"] == tiny.records(trained, "eval.jsonl")[-1]["domains"]
    # And from a fresh optimizer, sampler and mixer.
    assert tiny.records(tmp_path, "metrics.jsonl")[0]["tokens_seen"] == 8 * 32
    assert tiny.records(tmp_path, "policy.jsonl")[0]["state"]["count"] == 1


def test_sizes_give_way_to_the_weights_and_other_fields_do_not(exported, caplog):
    caplog.set_level("INFO")
    tokenizer = load_tokenizer(str(exported), texts=iter, cache_dir=exported)
    config = from_pretrained(exported, exported, model__rms_norm_eps=1e-5)
    model = model_config(config.model, tokenizer.vocab_size)
    assert (model.hidden_size, model.num_hidden_layers, model.rms_norm_eps) == (32, 2, 1e-5)
    assert "config.model.hidden_size = 64 gives way to 32, config.model.num_hidden_layers = 1 gives" in caplog.text
    config.model.from_scratch = True
    assert model_config(config.model, tokenizer.vocab_size).hidden_size == 64


def test_an_imported_run_trains_as_one_from_the_weights(root, trained, exported, tmp_path):
    import_pretrained(str(exported), recipe(root), tmp_path / "imported")
    assert tiny.evaluated(tmp_path / "imported", run_config.read(trained)) == tiny.evaluated(trained)

    train_and_evaluate(from_pretrained(root, exported), tmp_path / "imported")
    train_and_evaluate(from_pretrained(root, exported), tmp_path / "direct")
    for name in ("metrics.jsonl", "policy.jsonl", "eval.jsonl"):
        assert tiny.records(tmp_path / "imported", name) == tiny.records(tmp_path / "direct", name)
    with pytest.raises(InputError, match=r"--output=.*/imported: has checkpoints already"):
        import_pretrained(str(exported), recipe(root), tmp_path / "imported")


def test_an_import_needs_no_data(root, exported, tmp_path):
    nowhere = recipe(tmp_path / "none", data__domains=("a", "b"))
    import_pretrained(str(exported), nowhere, tmp_path / "run")
    import_pretrained(str(exported), recipe(root), tmp_path / "with_data")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        ours, theirs = (tmp_path / folder / "tokenizer" / name for folder in ("run", "with_data"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert tiny.evaluated(tmp_path / "run", recipe(root, data__tokenizer=str(exported))) == tiny.evaluated(
        tmp_path / "with_data"
    )


@pytest.mark.parametrize(
    ("mixer", "fields"),
    [
        ("static", {"seed": 7, "data__proportions": "uniform"}),
        (None, {"selector": "random", "seed": 3}),
        (None, {"order": "sorting", "data__seq_len": 16}),
    ],
    ids=["mixer", "selector", "order"],
)
def test_any_run_goes_on_from_an_import(root, exported, tmp_path, mixer, fields):
    """As it would have begun with the weights themselves."""
    fields = dict(fields)
    policies = {kind: fields.pop(kind) for kind in ("selector", "order") if kind in fields}
    import_pretrained(str(exported), recipe(root), tmp_path / "imported")
    for name in ("imported", "direct"):
        config = from_pretrained(root, exported)
        config.mixer = mixer and registry.policy_config("mixer", mixer)
        train_and_evaluate(tiny_chat.with_policies(config, fields, **policies), tmp_path / name)
    assert_same_curves(tmp_path / "imported", tmp_path / "direct", ("metrics.jsonl", "eval.jsonl"))


def test_an_imported_run_keeps_the_template_that_it_is_tuned_with(exported, tmp_path):
    questions = tiny_chat.write_questions(tmp_path / "questions")
    import_pretrained(str(exported), recipe(questions), tmp_path / "run")
    config = tiny_chat.config(questions, train_step=1, data__template="alpaca", data__tokenizer=str(exported))
    config.data.update(cutoff_len=512, buckets=(512,))
    config.model.update(name_or_path=str(exported), from_scratch=False)
    train_and_evaluate(config, tmp_path / "run")
    assert "### Instruction:" in open_model(tmp_path / "run").tokenizer.chat_template


def test_an_imported_run_needs_its_source_no_more(root, exported, tmp_path):
    source = shutil.copytree(exported, tmp_path / "source")
    import_pretrained(str(source), recipe(root), tmp_path / "run")
    shutil.rmtree(source)
    export_checkpoint(tmp_path / "run", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    text = "0123456789 one TWO\n  x_1 = 'é'"
    before, after = (tokenizers.Tokenizer.from_file(str(f / "tokenizer.json")) for f in (exported, tmp_path / "again"))
    assert before.encode(text).ids == after.encode(text).ids
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert theirs(text)["input_ids"] == before.encode(text).ids
    assert theirs.eos_token_id == folders.read_config(exported)["eos_token_id"]


def test_a_tokenizer_of_another_family_is_warned_of(trained, tmp_path, caplog):
    export_checkpoint(trained, tmp_path / "hf")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "dataflex_jax.training.exporting"]
    assert re.search(
        r"by the rules of Qwen2Tokenizer; load it with .*PreTrainedTokenizerFast\.from_pretrained", warning
    )


def test_an_export_is_onto_the_devices_there_are(trained, exported, tmp_path):
    """The run was on a mesh of its own; an export takes all devices."""
    run = shutil.copytree(trained, tmp_path / "run")
    config = run_config.read(run)
    config.mesh.update(data=64, fsdp=1)
    run_config.write(config, run / "config.json")
    export_checkpoint(run, tmp_path / "half", "bfloat16")
    half, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", exported))
    assert half.keys() == whole.keys()
    for name, tensor in half.items():
        assert tensor.dtype == "bfloat16"
        np.testing.assert_array_equal(tensor, whole[name].astype(tensor.dtype))


def test_a_pretrained_model_is_exported_in_another_dtype(exported, tmp_path):
    """Of the folder that it comes from only the tokenizer is copied."""
    source = shutil.copytree(exported, tmp_path / "source")
    (source / "model-00001-of-00002.safetensors").write_text("of another checkpoint")
    export_checkpoint(source, tmp_path / "half", "bfloat16")
    half, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", exported))
    assert half.keys() == whole.keys()
    for name, tensor in half.items():
        assert tensor.dtype == "bfloat16"
        np.testing.assert_array_equal(tensor, whole[name].astype(tensor.dtype))
    assert {file.name for file in (tmp_path / "half").iterdir()} == {file.name for file in exported.iterdir()}
    before, after = (tokenizers.Tokenizer.from_file(str(f / "tokenizer.json")) for f in (exported, tmp_path / "half"))
    assert before.encode("0123 aei").ids == after.encode("0123 aei").ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__name_or_path": None}, "config.model.from_scratch = False: needs config.model.name_or_path"),
        ({"data__tokenizer": "train:300"}, r"config.data.tokenizer = 'train:300': pretrained weights .* need the tok"),
        ({"model__name_or_path": "/no/such"}, "config.model.name_or_path = '/no/such': no such folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(root, exported, tmp_path, fields, message):
    config = from_pretrained(root, exported)
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    with pytest.raises(InputError, match=message) as e:
        train_and_evaluate(config, tmp_path)
    assert "\n" not in str(e.value)
