"""Orders in whole runs: what comes first is what the scores say, alone and inside a selector's windows."""

import json

import numpy as np
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.window import Sequences
from dataflex_jax.errors import InputError
from dataflex_jax.policies import Losses
from dataflex_jax.signals.row_sets import SweptRows
from dataflex_jax.training.setup import train_and_evaluate
from tests.helpers import tiny, tiny_chat


def assert_batches(rows, expected):
    """The batches are consecutive parts of what is expected; inside a batch the sampler mixes the rows."""
    expected = np.resize(expected, rows.shape)  # again from the beginning at the end
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.sort(expected, axis=1))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def coming(root):
    """The batches of the pool's own shuffles, [10, 8]."""
    config = tiny_chat.config(root)
    pool = Pool(open_domains(config.data, progress=False)[0])
    return Sequences(pool.groups(by_domain=False), config.seed).upcoming(0, 0, 80).reshape(10, 8)


@pytest.fixture(scope="module")
def difficulty(root):
    """Of each candidate, read from the files by the numbers of the records."""
    domains, _ = open_domains(tiny_chat.config(root).data, progress=False)
    pool = Pool(domains)
    lines = [(root / f"{domain.name}.jsonl").read_text().splitlines() for domain in domains]
    of_domain = pool.domain_of(np.arange(pool.num_rows))
    return np.array(
        [json.loads(lines[d][r])["difficulty"] for d, r in zip(of_domain, pool.records(), strict=True)], np.float32
    )


def test_sorted_by_a_field_training_goes_in_exactly_that_order(root, difficulty, tmp_path, monkeypatch):
    options = {"order": "sorting", "order__scores": "field:difficulty", "train_step": 10}
    run = tiny_chat.trained(tiny_chat.config(root, **options), tmp_path, monkeypatch)
    assert_batches(run.rows, np.argsort(difficulty, kind="stable"))


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_a_file_of_scores_is_obeyed(root, difficulty, tmp_path, monkeypatch, suffix):
    scores = np.random.default_rng(0).permutation(len(difficulty)).astype(np.float32)
    path = tmp_path / f"scores{suffix}"
    if suffix == ".npy":
        np.save(path, scores)
    else:
        path.write_text("".join(json.dumps({"score": float(s)}) + "\n" for s in scores))
    config = tiny_chat.config(root, order="sorting", order__scores=str(path), order__ascending=False)
    run = tiny_chat.trained(config, tmp_path / "run", monkeypatch)
    assert_batches(run.rows, np.argsort(scores)[::-1])


def test_a_mixer_draws_each_domain_in_its_order(root, difficulty, tmp_path, monkeypatch):
    options = {"order": "sorting", "order__scores": "field:difficulty", "mixer": "static"}
    config = tiny_chat.config(root, **options)
    run = tiny_chat.trained(config, tmp_path, monkeypatch)
    border = Pool(open_domains(config.data, progress=False)[0]).offsets[1]
    for low, high in ((0, border), (border, len(difficulty))):
        drawn = [np.sort(difficulty[batch[(low <= batch) & (batch < high)]]) for batch in run.rows]
        drawn = np.concatenate(drawn)
        np.testing.assert_array_equal(drawn, np.sort(difficulty[low:high])[: len(drawn)])


def test_a_shuffle_is_a_permutation_and_another_one_where_it_is_dynamic(
    root, coming, difficulty, tmp_path, monkeypatch
):
    options = {"order": "shuffle", "train_step": 9, "update_times": -1}
    static = tiny_chat.trained(tiny_chat.config(root, **options), tmp_path / "static", monkeypatch)
    assert len(set(static.rows[:8].reshape(-1).tolist())) == 64 <= len(difficulty) < 72
    assert set(static.rows.reshape(-1).tolist()) == set(range(len(difficulty)))
    dynamic = tiny_chat.trained(
        tiny_chat.config(root, **options, order__dynamic=True), tmp_path / "dynamic", monkeypatch
    )
    for step in (1, 3, 5, 7):
        ours, theirs = (np.sort(rows[step : step + 2], axis=1) for rows in (dynamic.rows, coming))
        assert (ours != theirs).any()
        np.testing.assert_array_equal(np.sort(ours, axis=None), np.sort(theirs, axis=None))
    assert_batches(dynamic.rows[:1], coming[:1])


def test_a_dynamic_order_scores_anew_what_comes_next(root, coming, tmp_path, monkeypatch):
    """Which rows are trained on does not change, also not once its updates are over."""
    asked, original = [], SweptRows.sweep

    def sweep(rows, signal, ids=None, operand=None):
        assert signal == Losses()
        values = original(rows, signal, ids, operand)
        asked.append((np.array(ids), values))
        return values

    monkeypatch.setattr(SweptRows, "sweep", sweep)
    options = {"order": "sorting", "order__dynamic": True}
    run = tiny_chat.trained(tiny_chat.config(root, **options), tmp_path / "run", monkeypatch)
    assert [(line["step"], line["policy"], line["selected"]) for line in run.decisions()] == [
        (1, "sorting", 16),
        (3, "sorting", 16),
    ]
    for (ids, values), step in zip(asked, (1, 3), strict=True):
        np.testing.assert_array_equal(ids, coming[step : step + 2].reshape(-1))
        assert_batches(run.rows[step : step + 2], ids[np.argsort(values, kind="stable")])
    assert_batches(run.rows[5:], coming[5:7])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["selector", "field:difficulty"])
def test_with_a_selector_the_window_is_arranged(root, difficulty, tmp_path, monkeypatch, source):
    options = {"selector": "less", "order": "sorting", "order__scores": source, "order__polarity": "higher_earlier"}
    run = tiny_chat.trained(tiny_chat.config(root, **options), tmp_path, monkeypatch)
    for step, arrays in run.selections().items():
        scores = arrays["all_scores"] if source == "selector" else difficulty
        assert_batches(run.rows[step : step + 2], arrays["ids"][np.argsort(-scores[arrays["ids"]], kind="stable")])
    assert_batches(run.rows[5:7], run.rows[3:5])
    assert [line["order"] for line in run.decisions()] == ["sorting"] * 2


@pytest.mark.parametrize(
    ("scores", "content", "message"),
    [
        ("field:nope", None, "config.order.scores = 'field:nope': domain 'capitals', .* no field 'nope'"),
        ("field:kind", None, "config.order.scores = 'field:kind': candidate 0 has '[ab]', not a number"),
        ("perplexity", None, 'config.order.scores = \'perplexity\': no such file; accepted: "loss", "selector",'),
        ("selector", None, "config.order.scores = 'selector': needs a config.selector that scores"),
        ("scores.txt", b"1\n", 'scores.txt\': accepted: "loss"'),
        ("scores.npy", b"garbage", "scores.npy: not an .npy file of numbers"),
        ("scores.jsonl", b'{"score": 1}\n2\n', r"scores.jsonl: float64 \[2\]; one number for each of \d+ candidates"),
        ("scores.jsonl", b'{"score": 1}\n{"scores": 2}\n', "scores.jsonl:2: a number, or an object with a number"),
        ("scores.jsonl", b"1\ntwo\n", "scores.jsonl:2: not valid JSON"),
        ("", None, "config.order.scores = '': must be 'loss', 'selector', 'field:NAME' or a .npy or .jsonl file"),
    ],
)
def test_scores_that_cannot_be_used_are_refused_by_name(root, tmp_path, scores, content, message):
    if content is not None:
        (tmp_path / scores).write_bytes(content)
        scores = str(tmp_path / scores)
    with pytest.raises(InputError, match=message) as caught:
        train_and_evaluate(tiny_chat.config(root, order="sorting", order__scores=scores), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"order__update_step": 2},
        {"order__warmup_step": 1, "order__dynamic": True, "selector": "random"},
    ],
)
def test_a_schedule_that_an_order_would_not_keep_is_refused(root, tmp_path, options):
    with pytest.raises(InputError, match=r"config\.order\.(update|warmup)_step: not used, the order arranges"):
        train_and_evaluate(tiny_chat.config(root, order="sorting", **options), tmp_path)


def test_rows_of_documents_have_no_fields(tmp_path):
    documents = tiny.write_domains(tmp_path / "documents", characters=1800, names=("digits", "vowels"))
    config = tiny_chat.documents(documents, order="sorting", order__scores="field:x")
    with pytest.raises(InputError, match=r"config\.order\.scores = 'field:x': rows of documents are no records"):
        train_and_evaluate(config, tmp_path / "run")
