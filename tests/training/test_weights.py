"""Models out of checkpoints of every kind, and runs that start from them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.text.tokenizer import load_tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.exporting import export_adapter, export_checkpoint
from dataflex_jax.training.locate import locate, run_at, tokenizer_of
from dataflex_jax.training.setup import prepared, train_and_evaluate
from dataflex_jax.training.weights import How, open_model
from tests.helpers import policy_runs, tiny

HOW = How(dtype="float32", remat="none")
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Two steps, both saved; a tokenizer that is trained."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_and_evaluate(config(root, data__tokenizer="train:300"), folder)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """That run as a Hugging Face folder."""
    export_checkpoint(str(run), run.parent / "exported")
    return run.parent / "exported"


@pytest.fixture(scope="module")
def adapted(root, run, exported):
    """Adapters on the exported run."""
    folder = run.parent / "adapted"
    fields = {"lora__rank": 2, "lora__base_dtype": "float32", "optim__learning_rate": 0.1}
    train_and_evaluate(starting_from(exported, root, **fields), folder)
    return folder


@pytest.fixture(scope="module")
def peft(run, adapted):
    """Those adapters as a PEFT folder."""
    export_adapter(str(adapted), run.parent / "peft")
    return run.parent / "peft"


def config(root, **fields):
    return policy_runs.config(root, **{"train_step": 2, "checkpoint_every": 1} | fields)


def starting_from(source, root, **fields):
    """A run from a checkpoint's weights, whose shape fields are another model's."""
    fields = {"model__name_or_path": str(source), "model__from_scratch": False, "model__hidden_size": 64} | fields
    return config(root, **{"data__tokenizer": str(source)} | fields)


def batch():
    tokens = np.random.default_rng(0).integers(0, 257, (8, 17))
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.ones((8, 16)), jnp.full(8, 16), jnp.zeros(8, jnp.int32))


@jax.jit
def token_losses(model):
    return model.token_losses(batch()).losses


def losses_of(source, how=HOW):
    opened = open_model(source, how=how)
    with jax.set_mesh(opened.mesh):
        return np.asarray(token_losses(opened.model))


def losses_at_start(config, folder):
    """Of the model that a run begins with, or goes on with."""
    with prepared(config, folder) as (job, state, _):
        return np.asarray(token_losses(job.model(state.params)))


# Opening.


def test_every_kind_of_checkpoint_is_the_runs_model(root, run, exported):
    expected = losses_at_start(config(root, data__tokenizer="train:300"), run)
    for source in (run, str(run), run / FOLDER / "2", exported):
        np.testing.assert_array_equal(losses_of(source), expected)
    assert np.abs(losses_of(run / FOLDER / "1") - expected).max() > 1e-3
    # The default is the compute dtype of training.
    assert 0 < np.abs(losses_of(exported, How(remat="none")) - expected).max() < 0.1


def test_a_peft_folder_is_the_adapted_model(root, exported, adapted, peft):
    fields = {"lora__rank": 2, "lora__base_dtype": "float32"}
    expected = losses_at_start(starting_from(exported, root, **fields), adapted)
    for source in (adapted, adapted / FOLDER / "2", peft):
        np.testing.assert_array_equal(losses_of(source), expected)
    assert np.abs(losses_of(exported) - expected).max() > 1e-3
    opened = open_model(peft, how=HOW)
    assert opened.model.config.lora.rank == 2
    np.testing.assert_allclose(token_losses(opened.model.without_adapters()), expected, atol=1e-5)


def test_a_pretrained_model_is_opened_as_a_run_would_have_it(root, exported):
    fields = {"lora__rank": 2, "lora__base_dtype": "bfloat16", "model__trainable": ("norm/*",)}
    opened = open_model(exported, how=How.of(config(root, **fields)))
    assert opened.model.frozen["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert opened.model.params["norm"]["scale"].dtype == jnp.float32
    assert opened.model.params["layers"]["mlp"]["up_proj"].keys() == {"lora_a", "lora_b"}
    assert (opened.model.config.dtype, opened.model.config.remat) == ("float32", "none")


def test_the_tokenizer_comes_along(run, exported, adapted, peft):
    tokenizer = load_tokenizer(str(run / "tokenizer"), texts=iter, cache_dir=run)
    for source, folder in (
        (run, run / "tokenizer"),
        (run / FOLDER / "1", run / "tokenizer"),
        (exported, exported),
        (adapted, adapted / "tokenizer"),
        (peft, exported),
    ):
        assert tokenizer_of(source) == open_model(source, how=HOW).tokenizer_source == str(folder)
        assert open_model(source, how=HOW).tokenizer.fingerprint == tokenizer.fingerprint
    assert load_tokenizer(str(run), texts=iter, cache_dir=run).fingerprint == tokenizer.fingerprint


def test_an_adapter_that_is_its_own_base_has_its_own_tokenizer(tmp_path):
    """Or none, but the search for it ends."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert tokenizer_of(tmp_path) == str(tmp_path)


def test_the_optimizers_state_comes_where_it_is_asked_for(root, run, exported):
    with prepared(config(root, data__tokenizer="train:300"), run) as (_, state, _):
        expected = state.opt_state
    opened = open_model(run, optimizer=True)
    for ours, theirs in zip(*map(jax.tree.leaves, (opened.adam.opt_state, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (opened.adam.b1, opened.adam.b2, opened.adam.eps) == (0.9, 0.95, 1e-8)
    assert opened.run == (run, 2)
    assert open_model(run).adam is None
    opened = open_model(exported, optimizer=True)
    assert (opened.adam, opened.run, opened.config, opened.saved) == (None, None, None, None)


def test_frozen_parameters_are_left_out_on_request(adapted):
    assert open_model(adapted).model.frozen is not None
    opened = open_model(adapted, frozen=False)
    assert opened.model.frozen is None
    assert opened.model.params["layers"]["mlp"]["up_proj"].keys() == {"lora_a", "lora_b"}


@pytest.mark.parametrize("content", ["", "[]", "3", "version https://git-lfs.github.com/spec/v1"])
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: "):
        open_model(tmp_path)


@pytest.mark.parametrize("content", [None, '{"hidden_size": 8}'])
def test_what_is_no_checkpoint_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    expected = rf"^--checkpoint={tmp_path}: neither a run folder \(with checkpoints/\), nor a step's folder in one, nor"
    with pytest.raises(InputError, match=expected):
        open_model(tmp_path)
    with pytest.raises(InputError, match=rf"^config.model.name_or_path = '{tmp_path}': neither"):
        locate(tmp_path, "model.name_or_path")


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path):
    for path in (tmp_path / "none", "/no/such", "a/b/c"):
        with pytest.raises(InputError, match="neither a run folder"):
            locate(path)
    for path in ("~nobody-of-that-name/model", "$NO_SUCH_VARIABLE/model", "x" * 5000 + "/y/z", "a\0b"):
        with pytest.raises(InputError) as error:
            locate(path)
        assert "\n" not in str(error.value)
    assert locate("some-id") is locate("owner/some-id") is None


def test_a_run_without_a_complete_checkpoint_is_named(tmp_path):
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(InputError, match=f"^--checkpoint={tmp_path}: no complete checkpoint in {tmp_path}/checkpoints"):
        run_at(tmp_path)


# Starting.


@pytest.mark.parametrize("tokenizer", ["", "tokenizer"])
def test_a_run_starts_from_another_runs_weights(root, run, tmp_path, tokenizer):
    made = starting_from(run, root, data__tokenizer=str(run / tokenizer))
    np.testing.assert_array_equal(losses_at_start(made, tmp_path / "new"), losses_of(run))
    made.model.name_or_path = str(run / FOLDER / "1")
    np.testing.assert_array_equal(losses_at_start(made, tmp_path / "earlier"), losses_of(run / FOLDER / "1"))


def test_a_run_starts_from_an_adapted_runs_weights_with_the_adapters_merged(root, adapted, tmp_path):
    merged = open_model(adapted).model.without_adapters()
    made = starting_from(adapted, root)
    with prepared(made, tmp_path / "new") as (job, state, _):
        assert job.model(state.params).config.lora is None
        for ours, theirs in zip(*map(jax.tree.leaves, (state.params, merged.whole())), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(losses_at_start(made, tmp_path / "again"), losses_of(adapted), atol=1e-5)


def test_only_the_shape_is_a_runs_where_training_is_from_scratch(root, run, tmp_path):
    made = starting_from(run, root, model__from_scratch=True, model__hidden_size=None)
    made.model.update(dict.fromkeys(SHAPE))
    with prepared(made, tmp_path) as (job, state, _):
        model = job.model(state.params)
    assert model.config.hidden_size == 16
    assert np.abs(np.asarray(token_losses(model)) - losses_of(run)).max() > 0.1


def test_adapters_go_onto_a_run(root, run, tmp_path):
    """And on as a checkpoint and a PEFT folder, whose base is a run folder."""
    made = starting_from(run, root, lora__rank=2, lora__base_dtype="float32", train_step=1)
    np.testing.assert_array_equal(losses_at_start(made, tmp_path / "fresh"), losses_of(run))
    train_and_evaluate(made, tmp_path / "run")
    export_adapter(str(tmp_path / "run"), tmp_path / "peft")
    expected = losses_of(tmp_path / "run")
    assert np.abs(expected - losses_of(run)).max() > 1e-4
    np.testing.assert_array_equal(losses_of(tmp_path / "peft"), expected)
    assert tokenizer_of(tmp_path / "peft") == str(run / "tokenizer")


def test_another_tokenizer_than_the_weights_is_refused(root, run, tmp_path):
    with pytest.raises(InputError, match=r"^config.data.tokenizer = 'train:300': pretrained weights .* need the token"):
        train_and_evaluate(starting_from(run, root, data__tokenizer="train:300"), tmp_path)


def test_weights_that_are_none_are_one_line(root, tmp_path):
    made = starting_from(tmp_path / "none", root, data__tokenizer="bytes")
    with pytest.raises(InputError, match=rf"^config.model.name_or_path = '{tmp_path}/none': neither a run folder") as e:
        train_and_evaluate(made, tmp_path / "run")
    assert "\n" not in str(e.value)
