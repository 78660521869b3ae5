"""The choice of training without training."""

import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies.selectors.delta_loss import in_window
from dataflex_jax.selection.records import chosen_records
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.training import optim, selecting
from dataflex_jax.training.selecting import learning_rates, select
from tests.helpers import (
    select_run,
    several,  # noqa: F401 - registers it
    tiny,
    tiny_chat,
)
from tests.helpers.select_run import SELECTOR


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return select_run.train(root, tmp_path_factory.mktemp("run"))


def at(run, *steps):
    return [str(run / "checkpoints" / str(step)) for step in steps]


def test_the_scores_are_those_of_training(root, run):
    for step in (2, 4):
        _, chosen = select(tiny_chat.config(root, **SELECTOR), at(run, step), None, 16)
        trained = tiny_chat.selections(run)[step]
        np.testing.assert_allclose(chosen.all_scores, trained["all_scores"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(chosen.ids, trained["ids"])
        np.testing.assert_allclose(chosen.scores, trained["scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_selectors_by_embeddings_and_words_choose_the_same_on_one_device_and_on_eight(root, run, monkeypatch):
    config = tiny_chat.config(root, selector="several")
    _, on_eight = select(config.copy_and_resolve_references(), at(run, 4), None, 16)
    monkeypatch.setattr(selecting, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1]))
    _, on_one = select(config, at(run, 4), None, 16)
    np.testing.assert_array_equal(on_eight.all_scores, on_one.all_scores)
    np.testing.assert_array_equal(on_eight.ids, on_one.ids)
    # Each of the five has chosen 16.
    which = np.asarray(on_one.all_scores, int) % 32
    assert [int(((which >> place) & 1).sum()) for place in range(5)] == [16] * 5


@pytest.mark.slow
def test_several_checkpoints_are_a_weighted_sum(root, run):
    first, second = (tiny_chat.selections(run)[step]["all_scores"] for step in (2, 4))
    config = tiny_chat.config(root, **SELECTOR)
    _, chosen = select(config, at(run, 2, 4), [0.25, 2.0], 5)
    expected = 0.25 * first + 2.0 * second
    np.testing.assert_allclose(chosen.all_scores, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(chosen.ids, np.argsort(-expected, kind="stable")[:5])
    _, default = select(config, at(run, 2, 4), None, 5)
    # Falling to 0 in 5 steps: the update before checkpoint 2 had 4/5 of the highest rate, the one before 4 had 2/5.
    np.testing.assert_allclose(default.all_scores, (2 * first + second) / 3, rtol=1e-5, atol=1e-6)


def test_learning_rates_of_checkpoints(root, run):
    np.testing.assert_allclose(learning_rates(at(run, 2, 4)), [2 / 3, 1 / 3], rtol=1e-6)
    rate = optim.learning_rate(tiny_chat.config(root, optim__schedule="linear").optim, 5)
    assert rate(1) / rate(3) == pytest.approx(2)


def test_other_selectors_take_the_last_checkpoint_and_the_first_as_baseline(root, run, monkeypatch):
    losses, original = [], SweptRows.sweep
    monkeypatch.setattr(SweptRows, "sweep", lambda *args: losses.append(original(*args)) or losses[-1])
    config = tiny_chat.config(root, selector="delta_loss", selector__window_size=0.5)
    _, chosen = select(config, at(run, 2, 5), None, 8)
    first, last = losses
    assert last.mean() < first.mean()
    inside = np.asarray(in_window(jnp.asarray(first - last), 1, 1, 0.5))
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(chosen.all_scores == chosen.all_scores.max(), inside)


NICE = {"selector": "nice", "selector__reward": "tests.helpers.rewards:letters", "selector__max_new_tokens": 6}


@pytest.mark.slow
def test_checkpoints_answer_one_after_the_other(root, run):
    config = tiny_chat.config(root, **NICE, selector__group_agg="mean")
    weights = [0.25, 2.0]
    apart = [select(config, at(run, step), None, 5)[1].all_scores for step in (2, 4)]
    _, chosen = select(config, at(run, 2, 4), weights, 5)
    np.testing.assert_allclose(chosen.all_scores, 0.25 * apart[0] + 2.0 * apart[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [SELECTOR, pytest.param(NICE, marks=pytest.mark.slow)], ids=["less", "nice"])
def test_one_checkpoint_is_in_memory_at_a_time(root, run, monkeypatch, fields):
    reads = []
    original = selecting.open_model

    def opened(source, *args, **options):
        gc.collect()
        assert not any(alive() for _, alive in reads)
        model = original(source, *args, **options)
        reads.append((source, weakref.ref(jax.tree.leaves(model.model.params)[0])))
        return model

    monkeypatch.setattr(selecting, "open_model", opened)
    select(tiny_chat.config(root, **fields), at(run, 2, 4), None, 5)
    second, fourth = at(run, 2, 4)
    assert [source for source, _ in reads] in ([second, fourth], [fourth, second, fourth])


def test_by_default_a_twentieth_is_chosen(root, run):
    pool, chosen = select(tiny_chat.config(root, **SELECTOR), at(run, 5), None, None)
    assert len(chosen.ids) == round(0.05 * pool.num_rows) == 3


def test_the_share_that_a_selector_keeps_is_chosen(root, run):
    config = tiny_chat.config(root, selector="random", selector__keep=0.4)
    pool, chosen = select(config, at(run, 5), None, None)
    assert len(chosen.ids) == round(0.4 * pool.num_rows)
    with pytest.raises(InputError, match=r"^config.selector.keep = 0.4: not together with --num=5; leave one out"):
        select(config, at(run, 5), None, 5)


def test_more_than_there_are_repeats_every_candidate_equally(root, run):
    pool, chosen = select(tiny_chat.config(root, selector="random"), at(run, 5), None, 150)
    assert set(np.bincount(chosen.ids, minlength=pool.num_rows)) == {2, 3}


def test_a_selector_that_scores_is_needed(root, run):
    for options in ({}, {"selector": "full"}):
        with pytest.raises(InputError, match="--config: needs a selector that scores"):
            select(tiny_chat.config(root, **options), at(run, 5), None, 5)
    options = {"selector": "rho_loss", "selector__reference": str(run)}
    with pytest.raises(InputError, match=r"^config.selector.name = 'rho_loss': chooses inside training steps"):
        select(tiny_chat.config(root, **options), at(run, 5), None, 5)


def test_rows_of_documents_have_no_records(tmp_path, run):
    documents = tiny.write_domains(tmp_path / "documents", characters=1800, names=("digits", "vowels"))
    with pytest.raises(InputError, match="--records: rows of documents are no records"):
        select(tiny_chat.documents(documents, selector="random"), at(run, 5), None, 5, records=True)


def test_records_of_several_formats_are_messages(tmp_path, run):
    alpaca = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(30)]
    messages = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(30)
    ]
    (tmp_path / "a.json").write_text(json.dumps(alpaca))
    (tmp_path / "b.json").write_text(json.dumps(messages))
    entries = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json", "formatting": "openai"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    config = tiny_chat.config(tmp_path, selector="random", data__source="dataset_info", data__formatting=None)
    pool, chosen = select(config, at(run, 5), None, 40, records=True)
    records = list(chosen_records(pool, chosen.ids))
    assert len(records) == 40
    for record in records:
        number = record["messages"][1]["content"]
        asked, answered = {"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": number}
        assert record == {"messages": [asked, answered]}
