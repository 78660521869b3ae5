"""Whole runs that train chosen parameters: what changes, what is saved, exact resume, and what goes with them."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.models import parts
from dataflex_jax.policies.signals import Projection
from dataflex_jax.signals.gradients import gradient_features
from dataflex_jax.signals.rows import row_loss
from dataflex_jax.training.checkpoint import FOLDER
from dataflex_jax.training.exporting import export_checkpoint
from dataflex_jax.training.selecting import select
from dataflex_jax.training.setup import prepared, train_and_evaluate
from dataflex_jax.training.weights import open_model
from tests.helpers import policy_runs, tiny, tiny_chat
from tests.helpers.command import assert_same_curves, copy_of
from tests.training.test_weights import batch

ATTENTION = ("layers/attention/*",)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


def config(root, **fields):
    return policy_runs.config(
        root, "odm", **{"train_step": 4, "checkpoint_every": 2, "model__trainable": ATTENTION} | fields
    )


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(config(root), folder)
    return folder


@pytest.fixture(scope="module")
def start(root, tmp_path_factory):
    """What a run that trains all parameters starts with."""
    with prepared(config(root, model__trainable=None), tmp_path_factory.mktemp("start")) as (_, state, _):
        return dict(parts.leaves(jax.device_get(state.params)))


def parameters(source):
    return dict(parts.leaves(jax.device_get(open_model(source).model.whole())))


def in_attention(path):
    return path.startswith("layers/attention/")


def test_only_the_chosen_parameters_change(run, start):
    after = parameters(run)
    assert after.keys() == start.keys()
    for path, value in after.items():
        if in_attention(path):
            assert np.abs(value - start[path]).max() > 1e-4, path
        else:
            np.testing.assert_array_equal(value, start[path], err_msg=path)
    assert 0 < sum(map(in_attention, after)) < len(after)


def test_a_checkpoint_holds_only_the_chosen_parameters(run, start):
    saved = ocp.StandardCheckpointer().metadata(run / FOLDER / "4" / "state").item_metadata
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(saved["params"]))
    assert shapes == sorted(value.shape for path, value in start.items() if in_attention(path))
    large = {value.shape for path, value in start.items() if not in_attention(path) and value.ndim > 2}
    assert large.isdisjoint(leaf.shape for leaf in jax.tree.leaves(saved) if hasattr(leaf, "shape"))


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(root, run, tmp_path):
    resumed = copy_of(run, tmp_path / "run")
    shutil.rmtree(resumed / FOLDER / "4")
    train_and_evaluate(config(root), resumed)
    assert_same_curves(resumed, run)
    for path, value in parameters(resumed).items():
        np.testing.assert_array_equal(value, parameters(run)[path], err_msg=path)


@pytest.mark.parametrize("now", [None, ("layers/mlp/*",), (*ATTENTION, "norm/*")])
def test_other_patterns_are_refused_by_name(root, run, now):
    shown = None if now is None else list(now)
    with pytest.raises(InputError) as e:
        train_and_evaluate(config(root, model__trainable=now, train_step=6), run)
    assert str(e.value) == (
        f"config.model.trainable = {shown!r}: the checkpoint was trained with {list(ATTENTION)!r}; use a new --workdir"
    )


def test_a_run_that_trained_all_does_not_go_on_with_fewer(root, tmp_path):
    train_and_evaluate(config(root, model__trainable=None, train_step=1), tmp_path)
    with pytest.raises(
        InputError, match=r"config.model.trainable = \['layers/.*'\]: the checkpoint was trained with None"
    ):
        train_and_evaluate(config(root), tmp_path)


def test_a_pattern_that_matches_nothing_is_one_line(root, tmp_path):
    with pytest.raises(
        InputError, match=r"config.model.trainable: 'head/\*' matches no parameter; they are embed"
    ) as e:
        train_and_evaluate(config(root, model__trainable=(*ATTENTION, "head/*")), tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_beside_adapters_both_are_trained(root, start, tmp_path):
    fields = {"lora__rank": 2, "lora__base_dtype": "float32", "lora__target_modules": ("q_proj", "up_proj")}
    made = config(root, model__trainable=("*norm/scale",), **fields)
    train_and_evaluate(made, tmp_path / "run")
    after = parameters(tmp_path / "run")
    changed = {path for path, value in after.items() if path in start and np.abs(value - start[path]).max() > 1e-5}
    assert changed == {path for path in start if path.endswith("norm/scale")}
    adapters = {path for path in after if parts.is_adapter(path)}
    assert after.keys() == start.keys() | adapters
    assert all(np.abs(after[path]).max() > 1e-5 for path in adapters)
    resumed = copy_of(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(resumed / FOLDER / "4")
    train_and_evaluate(made, resumed)
    assert_same_curves(resumed, tmp_path / "run")
    assert tiny.evaluated(tmp_path / "run") == tiny.records(tmp_path / "run", "eval.jsonl")[-1]["domains"]


@pytest.mark.slow
def test_the_frozen_rest_may_come_from_a_checkpoint(root, run, start, tmp_path):
    """Which must then stay what it is; and an export holds them all."""
    export_checkpoint(str(run), tmp_path / "base")
    made = config(root, model__trainable=("layers/mlp/*",), model__name_or_path=str(tmp_path / "base"))
    made.model.from_scratch, made.data.tokenizer = False, str(tmp_path / "base")
    train_and_evaluate(made, tmp_path / "run")
    before, after = parameters(run), parameters(tmp_path / "run")
    for path, value in after.items():
        assert np.array_equal(value, before[path]) != path.startswith("layers/mlp/"), path
    export_checkpoint(str(tmp_path / "run"), tmp_path / "exported")
    for path, value in parameters(tmp_path / "exported").items():
        np.testing.assert_array_equal(value, after[path])
    # Of the base only what the run does not train matters.
    shutil.copy(tmp_path / "exported" / "model.safetensors", tmp_path / "base")
    open_model(tmp_path / "run")
    export_checkpoint(str(run / FOLDER / "2"), tmp_path / "earlier")
    shutil.copy(tmp_path / "earlier" / "model.safetensors", tmp_path / "base")
    with pytest.raises(InputError, match="belong to another base"):
        open_model(tmp_path / "run")


@pytest.mark.parametrize("patterns", [pytest.param(ATTENTION, marks=pytest.mark.slow), ("norm/scale",)])
def test_gradients_of_rows_are_those_of_the_chosen_parameters(root, tmp_path, patterns):
    train_and_evaluate(config(root, model__trainable=patterns, train_step=1), tmp_path)
    model, rows = open_model(tmp_path).model, batch()

    def losses(params):
        return jax.vmap(row_loss)(model.with_params(params).token_losses(rows).losses, rows)

    of_rows = jax.jacrev(losses)(model.params)
    wanted = [leaf for path, leaf in parts.leaves(of_rows) if patterns != ATTENTION or path.endswith("kernel")]
    features = gradient_features(Projection("none"))(model, rows)
    expected = np.concatenate([np.reshape(leaf, (8, -1)) for leaf in wanted], axis=1)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-2


@pytest.mark.slow
def test_less_chooses_by_the_chosen_parameters(tmp_path):
    questions = tiny_chat.write_questions(tmp_path / "questions")
    fields = {"selector": "less", "train_step": 3, "checkpoint_every": 1}
    made = tiny_chat.config(questions, **fields, warmup_step=2, model__trainable=ATTENTION)
    train_and_evaluate(made, tmp_path / "run")
    chosen_while_training = tiny_chat.selections(tmp_path / "run")[2]
    _, chosen = select(made, [str(tmp_path / "run" / FOLDER / "2")], None, 16)
    np.testing.assert_allclose(chosen.all_scores, chosen_while_training["all_scores"], rtol=1e-5, atol=1e-6)
    assert np.ptp(chosen.all_scores) > 1e-3
