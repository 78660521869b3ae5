"""Runs that select by embeddings that stay as they are: computed once, resumed exactly, by domain with a mixer."""

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.signals.texts import TextModel
from dataflex_jax.training.selecting import select
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import embedding_model, tiny_chat
from tests.runs.test_resume import interrupted_at
from tests.runs.test_selection_resume import assert_same_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return embedding_model.write(tmp_path_factory.mktemp("embedding") / "model", max_position_embeddings=128)


def near(root, model, **fields):
    return tiny_chat.config(root, selector="near", selector__embedding_model=str(model), **fields)


@pytest.fixture
def embedded(monkeypatch):
    """How many texts were embedded, call by call."""
    original, asked = TextModel.of_texts, []

    def counting(self, function, texts, description):
        asked.append(len(texts))
        return original(self, function, texts, description)

    monkeypatch.setattr(TextModel, "of_texts", counting)
    return asked


@pytest.mark.slow
def test_every_update_and_every_run_takes_the_same_embeddings(root, model, tmp_path, embedded):
    config = near(root, model, checkpoint_every=1, keep=9, train_step=5)
    train_and_evaluate(config, tmp_path / "whole")
    assert embedded == [67, 11]
    first, second = tiny_chat.selections(tmp_path / "whole").values()
    np.testing.assert_array_equal(first["all_scores"], second["all_scores"])
    _, chosen = select(near(root, model), [], None, len(first["ids"]))
    np.testing.assert_array_equal(chosen.ids, first["ids"])
    run = interrupted_at(2, tmp_path / "whole", tmp_path / "run")
    train_and_evaluate(config, run)
    assert_same_run(run, tmp_path / "whole")
    assert embedded == [67, 11]
    _, by_itself = select(near(root, run), [], None, 67)
    assert embedded == [67, 11, 67, 11]
    assert set(by_itself.ids) == set(range(67))


def test_with_a_mixer_each_domain_has_its_nearest(root, tmp_path):
    rng = np.random.default_rng(0)
    for name, rows in (("candidates", 67), ("targets", 11)):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(rows, 3)))
    files = {f"selector__{name[:-1]}_embeddings": str(tmp_path / f"{name}.npy") for name in ("candidates", "targets")}
    config = tiny_chat.config(root, selector="near", mixer="static", train_step=3, **files)
    train_and_evaluate(config, tmp_path / "run")
    for chosen in tiny_chat.selections(tmp_path / "run").values():
        assert set(chosen["domains"]) == {0, 1}
        for domain, rows in enumerate((slice(0, 38), slice(38, 67))):
            scores, picked = chosen["all_scores"][rows], chosen["ids"][chosen["domains"] == domain] - rows.start
            np.testing.assert_array_equal(picked, np.argsort(-scores, kind="stable")[: len(picked)])


def test_what_cannot_be_had_is_said_before_the_first_step(root, tmp_path):
    other = embedding_model.write(tmp_path / "model", model_type="bert")
    with pytest.raises(InputError, match="model model_type='bert' is not supported"):
        train_and_evaluate(near(root, other), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
