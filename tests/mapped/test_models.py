"""Models that are trained as one program: each is what it would be alone, also after a stop and on more devices."""

import json
import shutil

import jax
import numpy as np
import pytest

from dataflex_jax.data.targets import open_targets
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.mapped import models, programs
from dataflex_jax.mapped.draws import Draws
from dataflex_jax.mapped.members import Member
from dataflex_jax.sharding import make_mesh
from dataflex_jax.training.checkpoint import Checkpoints
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat

STEPS, STOP = 20, 9
SMALL = {"train_step": STEPS, "checkpoint_every": 6, "eval_rows": 10**6}
MEMBERS = [
    Member("as configured", 42),
    Member("another seed", 43),
    Member("a domain left out", 44, proportions=np.array([0.5, 0.5, 0.0])),
    Member("a third of the rows", 42, rows=np.arange(0, 470, 3)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_domains(tmp_path_factory.mktemp("data") / "domains")


def config(root, mixer="odm", **fields):
    made = tiny.config(root, mixer, **(SMALL | fields))
    made.model.update(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    made.model.num_hidden_layers = 1
    return made


def train(config, folder, *, members=MEMBERS, devices=1, at_once=2, stop_at=None):
    """(losses of the members or None, the rows that each trained on [S, steps, B])."""
    asked, load = [], Draws.load

    def spy(self, rows, plans, length=None):
        if length is None:
            asked.append(rows)
        return load(self, rows, plans, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "load", spy)
        patch.setattr(models, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:devices]))
        with models.opened(config, folder) as shared:
            experiment = shared.experiment
            targets = open_targets(config, experiment.inputs.domains, experiment.inputs.tokenizer_source)
            if stop_at is not None:
                calls = iter(range(1, 10**6))
                shared = shared._replace(stop_requested=lambda step: next(calls) == stop_at)
            losses = models.train_and_measure(shared, members, [targets], at_once=at_once)
    return losses, asked


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(config(root), folder)


def test_each_model_is_what_it_would_be_alone(root, whole, tmp_path, monkeypatch):
    _, losses, rows = whole
    alone = config(root, seed=44, data__proportions=(0.5, 0.5, 0.0), mesh__fsdp=1, mesh__data=-1)
    run = tiny_chat.trained(alone, tmp_path / "run", monkeypatch)
    # The third member is the first of the second program.
    np.testing.assert_array_equal(run.rows, [ids[0] for ids in rows[STEPS:]])
    figures = tiny.records(tmp_path / "run", "eval.jsonl")[-1]["domains"]
    np.testing.assert_allclose(losses[2], [figures[name]["nll"] for name in sorted(figures)], rtol=1e-5)


def test_members_differ_by_their_seed_mixture_and_rows(whole):
    _, losses, rows = whole
    assert len(np.unique(losses[:, 0])) == len(MEMBERS)
    first, second, third, fourth = (
        np.unique([ids[i] for ids in rows[part : part + STEPS]]) for part in (0, STEPS) for i in range(2)
    )
    assert not np.array_equal(first, second)
    assert set(fourth) <= set(MEMBERS[3].rows)
    assert third.max() < first.max()  # the last domain is never drawn


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """A folder of members that were stopped in the second program, between two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    assert train(config(root), folder, stop_at=STEPS + STOP)[0] is None
    return folder


def test_a_stopped_training_goes_on_bit_for_bit(root, whole, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    with Checkpoints(folder, writable=False) as checkpoints:
        assert checkpoints.latest() == 18 + STOP  # 18 is the last one of the first program
    losses, rows = train(config(root), folder)
    assert len(rows) == STEPS - STOP
    np.testing.assert_array_equal(losses, whole[1])
    with Checkpoints(folder, writable=False) as checkpoints:
        assert checkpoints.latest() is None  # nobody needs them any more


def test_eight_devices_and_vectorised_members_are_the_same_models(root, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "vectorises", lambda mesh: True)  # as on an accelerator
    losses, _ = train(config(root), tmp_path, devices=8, at_once=None)
    np.testing.assert_allclose(losses, whole[1], rtol=1e-5)


def test_what_is_trained_is_not_trained_again(root, whole):
    folder, losses, _ = whole
    again, rows = train(config(root, log_every=3), folder, members=[MEMBERS[3], MEMBERS[1]])
    assert rows == []
    np.testing.assert_array_equal(again, losses[[3, 1]])


def test_a_folder_of_other_models_is_refused(root, whole):
    with pytest.raises(
        InputError, match=r"models\.json: .* with config\.train_step = 20, not 3; choose another folder"
    ):
        train(config(root, train_step=3), whole[0])
    assert json.loads((whole[0] / "config.json").read_text())["config"]["train_step"] == STEPS


def test_members_in_training_cannot_be_left_out(root, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    with pytest.raises(InputError, match=r"other models are in training there \(a third of the rows\); choose another"):
        train(config(root), folder, members=MEMBERS[:3])
    with pytest.raises(InputError, match="2 models are in training there as one program, which 8 devices cannot share"):
        train(config(root), folder, devices=8)


def test_an_altered_book_is_refused(root, whole, tmp_path):
    book = json.loads((whole[0] / "models.json").read_text())
    book["models"][0]["losses"][0] += 1
    (tmp_path / "models.json").write_text(json.dumps(book))
    with pytest.raises(InputError, match=r"models\.json: altered after it was written"):
        train(config(root), tmp_path)


def test_a_selector_is_refused(root, tmp_path):
    with pytest.raises(InputError, match=r"^config.selector: models that are trained as one program draw without one"):
        train(tiny_chat.documents(root, selector="loss"), tmp_path)


def test_a_member_without_rows_of_a_domain_is_named(root, tmp_path):
    with pytest.raises(InputError, match="few: none of its 2 rows is of 'digits'; give it more"):
        train(config(root), tmp_path, members=[Member("few", 1, rows=np.array([0, 100]))])


@pytest.mark.slow
def test_a_model_that_diverges_is_named(root, tmp_path):
    broken = config(root, optim__learning_rate=1e30, optim__clip_norm=0.0)
    with pytest.raises(TrainingError, match=r"^as configured: .* at step .*; no checkpoint is complete yet"):
        train(broken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["doge", "ado", "loss_softmax", "random", None])
def test_mixers_that_ask_between_steps_do_so_for_each_model(root, mixer, tmp_path, monkeypatch):
    fields = {"warmup_step": 4, "update_step": 3}
    losses, rows = train(config(root, mixer, **fields), tmp_path / "mapped", members=MEMBERS[:2])
    run = tiny_chat.trained(
        config(root, mixer, seed=43, mesh__fsdp=1, mesh__data=-1, **fields), tmp_path / "run", monkeypatch
    )
    np.testing.assert_array_equal(run.rows, [ids[1] for ids in rows])
    figures = tiny.records(tmp_path / "run", "eval.jsonl")[-1]["domains"]
    np.testing.assert_allclose(losses[1], [figures[name]["nll"] for name in sorted(figures)], rtol=1e-5)


@pytest.mark.slow
def test_adapters_on_weights_are_trained_as_they_would_be_alone(root, tmp_path, monkeypatch):
    weights = config(root, None, train_step=2)
    train_and_evaluate(weights, tmp_path / "weights")
    start = {"model__name_or_path": str(tmp_path / "weights"), "model__from_scratch": False}
    fields = {**start, "lora__rank": 2, "lora__base_dtype": "float32", "lora__dropout": 0.1}
    losses, _ = train(config(root, "odm", **fields), tmp_path / "mapped", members=MEMBERS[:2])
    tiny_chat.trained(
        config(root, "odm", seed=43, mesh__fsdp=1, mesh__data=-1, **fields), tmp_path / "run", monkeypatch
    )
    figures = tiny.records(tmp_path / "run", "eval.jsonl")[-1]["domains"]
    np.testing.assert_allclose(losses[1], [figures[name]["nll"] for name in sorted(figures)], rtol=1e-5)


def test_epochs_are_of_the_whole_pool(root, tmp_path):
    short = config(root, epochs=0.5, train_step=None)
    with models.opened(short, tmp_path) as shared:
        assert (
            short.train_step == shared.experiment.config.train_step == -(-shared.experiment.inputs.pool.num_rows // 16)
        )


def test_random_frozen_parameters_have_one_seed(root, tmp_path):
    with pytest.raises(InputError, match=r"^config.seed: random frozen parameters have one seed"):
        train(config(root, lora__rank=2), tmp_path, members=MEMBERS[:2])
