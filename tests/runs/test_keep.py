"""A selector as a filter: what it keeps is what is drawn from until the next update, in shuffled epochs or in order."""

import itertools

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.selection.choosing import share_of
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny_chat
from tests.helpers.command import assert_same_curves
from tests.runs.test_resume import interrupted_at

KEEP, BATCH = 0.3, 8
UPDATES = {"train_step": 9, "warmup_step": 1, "update_step": 4, "update_times": -1}  # after 1, 5 and 9 steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def pool(root):
    return Pool(open_domains(tiny_chat.config(root).data, progress=False)[0])


def config(root, **options):
    return tiny_chat.config(root, selector="loss", selector__keep=KEEP, **UPDATES, **options)


def assert_passes(rows, kept):
    """Every row of `kept` came once before any came again, and no other one did."""
    counts = np.array([(rows == i).sum() for i in kept])
    assert counts.sum() == rows.size
    assert counts.max() - counts.min() <= 1


def test_the_pool_is_filtered_and_the_draws_that_follow_are_epochs_of_what_is_kept(root, pool, tmp_path, monkeypatch):
    made = config(root, checkpoint_every=3)
    run = tiny_chat.trained(made, tmp_path / "whole", monkeypatch)
    chosen = run.selections()
    assert list(chosen) == [1, 5]
    for step, arrays in chosen.items():
        assert len(arrays["ids"]) == len(set(arrays["ids"].tolist())) == share_of(KEEP, pool.num_rows) == 20
        assert_passes(run.rows[step : step + 4].reshape(-1), arrays["ids"])
    assert set(chosen[1]["ids"].tolist()) != set(chosen[5]["ids"].tolist())
    resumed = interrupted_at(3, tmp_path / "whole", tmp_path / "run")
    again = tiny_chat.trained(made, resumed, monkeypatch)
    np.testing.assert_array_equal(again.rows, run.rows[3:])
    assert_same_curves(resumed, tmp_path / "whole")
    tiny_chat.assert_same_selections(resumed, tmp_path / "whole")


def test_with_a_mixer_and_an_order_each_domain_is_filtered_and_what_comes_of_it_arranged(
    root, pool, tmp_path, monkeypatch
):
    scores = np.random.default_rng(0).permutation(pool.num_rows).astype(np.float32)
    np.save(tmp_path / "scores.npy", scores)
    options = {"order": "sorting", "order__scores": str(tmp_path / "scores.npy"), "data__proportions": (0.5, 0.5)}
    run = tiny_chat.trained(config(root, mixer="static", **options), tmp_path / "run", monkeypatch)
    sizes, ends = np.diff(pool.offsets), pool.offsets[1:]
    for step, arrays in run.selections().items():
        assert np.bincount(arrays["domains"]).tolist() == [share_of(KEEP, size) for size in sizes]
        rows = run.rows[step : step + 4]
        for domain, end in enumerate(ends):
            kept = arrays["ids"][arrays["domains"] == domain]
            came = [batch[pool.domain_of(batch) == domain] for batch in rows]
            assert_passes(np.concatenate(came), kept)
            assert (kept < end).all()
            # In order, in the batches that are all of the first pass over what is kept; inside a batch rows are mixed.
            first = np.cumsum([len(batch) for batch in came]) <= len(kept)
            levels = [scores[batch] for batch, whole in zip(came, first, strict=True) if whole and len(batch)]
            assert len(levels) > 1
            assert all(before.max() < after.min() for before, after in itertools.pairwise(levels))


def test_all_of_them_is_the_pool_without_what_is_not_finite(root, tmp_path):
    train_and_evaluate(tiny_chat.config(root, selector="random", selector__keep=1.0, train_step=2), tmp_path)
    (arrays,) = tiny_chat.selections(tmp_path).values()
    assert sorted(arrays["ids"].tolist()) == list(range(len(arrays["all_scores"])))
