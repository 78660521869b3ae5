"""Embeddings that stay as they are: an embedding model's and the user's own, in `select` and in runs."""

import functools
import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dataflex_jax.data.domains import open_domains
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.targets import open_targets
from dataflex_jax.errors import InputError
from dataflex_jax.policies.common.embedded import EmbeddingOptions
from dataflex_jax.policies.common.pooling import last_token
from dataflex_jax.sharding import make_mesh
from dataflex_jax.signals.sweep import Sweeper
from dataflex_jax.signals.texts import TextModel
from dataflex_jax.training import embeddings
from dataflex_jax.training.embeddings import Embedded, fixed_embeddings
from dataflex_jax.training.reference import Cache
from dataflex_jax.training.selecting import select
from dataflex_jax.training.weights import How, open_model
from tests.helpers import embedding_model, tiny, tiny_chat
from tests.helpers.embedding_model import WIDTH
from tests.policies.selectors.test_near import transcription

HOW = How(dtype="float32", head=False)
PREFIX = "Instruct: find the like\nQuery:"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_chat.write_questions(tmp_path_factory.mktemp("data") / "questions")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return embedding_model.write(tmp_path_factory.mktemp("embedding") / "model", max_position_embeddings=128)


def mesh_of(devices):
    return make_mesh({"data": -1}, jax.devices()[:devices])


def of_texts(model, texts):
    """Their embeddings, one text after the other, float64."""
    opened = open_model(model, mesh_of(1), how=HOW)
    asked = TextModel(opened.model, opened.tokenizer, Sweeper(opened.mesh))
    found = asked.of_texts(lambda m, b: last_token(m.hidden_states(b), b.real_inputs), texts, "embeddings")
    return np.asarray(found, np.float64)


def data_of(root, **fields):
    """(The configuration, its domains, tokenizer and target set.)"""
    config = tiny_chat.config(root, **fields)
    domains, tokenizer = open_domains(config.data, progress=False)
    return config, domains, tokenizer, open_targets(config, domains, config.data.tokenizer)


def questions(root, domains, split):
    """The texts of the records of a split, read from the files by hand."""
    texts = []
    for domain in domains:
        records = [json.loads(line) for line in (root / f"{domain.name}.jsonl").read_text().splitlines()]
        texts += [f"{records[i]['instruction']}\n{records[i]['output']}" for i in getattr(domain, split).examples.ids]
    return texts


@pytest.fixture(scope="module")
def expected(root, model):
    """Embeddings of all candidates and targets, float64."""
    _, domains, _, _ = data_of(root)
    targets = [PREFIX + text for text in questions(root, domains, "valid")]
    return of_texts(model, questions(root, domains, "train")), of_texts(model, targets)


def near(root, model, **fields):
    more = {"selector__embedding_model": str(model), "selector__target_prefix": PREFIX}
    return tiny_chat.config(root, selector="near", **more, **fields)


def in_order(expected):
    candidates, targets = expected
    distances = np.linalg.norm(targets[:, None] - candidates[None], axis=2)
    return transcription(distances, len(candidates))


def test_select_needs_no_checkpoint_and_equals_the_transcription(root, model, expected):
    pool, chosen = select(near(root, model), [], None, 67)
    assert chosen.ids.tolist() == in_order(expected)
    assert pool.num_rows == 67


@pytest.fixture(scope="module")
def files(expected, tmp_path_factory):
    """The same embeddings in files, each with a length of its own, as .npy and in both forms of Parquet."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name, rows in zip(("candidates", "targets"), expected, strict=True):
        rows = rows * np.random.default_rng(0).uniform(0.1, 9, (len(rows), 1))
        found[name, "npy"] = folder / f"{name}.npy"
        np.save(found[name, "npy"], rows)
        for form, table in (
            ("lists", pyarrow.table({"vector": rows.tolist()})),
            ("columns", pyarrow.table({f"x{i}": column for i, column in enumerate(rows.T)})),
        ):
            found[name, form] = folder / f"{name}_{form}.parquet"
            pyarrow.parquet.write_table(table, found[name, form], row_group_size=20)
    return found


def with_files(root, candidates, targets, selector="near", **fields):
    more = {"selector__candidate_embeddings": str(candidates), "selector__target_embeddings": str(targets)}
    return tiny_chat.config(root, selector=selector, **more, **fields)


@pytest.mark.parametrize("form", ["npy", "lists", "columns"])
def test_embeddings_of_the_users_own_need_no_model(root, files, expected, form):
    _, chosen = select(with_files(root, files["candidates", form], files["targets", form]), [], None, 67)
    assert chosen.ids.tolist() == in_order(expected)


def test_candidates_of_a_file_and_targets_of_the_model(root, model, files, expected):
    config = near(root, model)
    config.selector.candidate_embeddings = str(files["candidates", "npy"])
    assert select(config, [], None, 67)[1].ids.tolist() == in_order(expected)


@pytest.mark.parametrize("selector", ["rds", "tsds"])
def test_other_selectors_take_them_too(root, files, expected, selector):
    config = with_files(root, files["candidates", "npy"], files["targets", "npy"], selector)
    _, chosen = select(config, [], None, 5)
    if selector == "rds":
        candidates, targets = expected
        np.testing.assert_allclose(chosen.all_scores, (candidates @ targets.T).max(axis=1), atol=1e-5)
    else:
        assert chosen.all_scores.sum() == pytest.approx(1, abs=1e-5)


@functools.cache
def sweeper_of(devices, rows):
    """One for all tests, as each compiles anew."""
    return Sweeper(mesh_of(devices), rows=rows)


def fixed(root, model, folder, *, devices=8, rows=None, **fields):
    """What `fixed_embeddings` gives in a cache of its own."""
    _, domains, tokenizer, targets = data_of(root, **fields)
    wanted = EmbeddingOptions(embedding_model=str(model), target_prefix=PREFIX).signal("mean")
    pool, sweeper = Pool(domains), sweeper_of(devices, rows)
    sides = (
        Embedded("candidates", pool, np.arange(pool.num_rows), tokenizer),
        Embedded("targets", targets.pool, targets.ids, tokenizer),
    )
    return fixed_embeddings([wanted], *sides, sweeper, Cache(str(folder), "sampled"), HOW)[wanted]


def test_a_stopped_pass_goes_on_and_ends_the_same(root, model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "_CHUNK", 20)
    whole = fixed(root, model, tmp_path / "whole")
    for found, wanted in zip(whole, expected, strict=True):
        assert isinstance(found, np.memmap)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    original, asked = TextModel.of_texts, []

    def stopping(self, function, texts, description):
        asked.append(len(texts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(self, function, texts, description)

    with monkeypatch.context() as patch:
        patch.setattr(TextModel, "of_texts", stopping)
        with pytest.raises(KeyboardInterrupt):
            fixed(root, model, tmp_path / "stopped")
        again = fixed(root, model, tmp_path / "stopped")
        assert asked == [20, 20, 20, 20, 7, 11]
        patch.delattr(embeddings, "open_model")  # what is kept needs no model
        fixed(root, model, tmp_path / "stopped")
        assert len(asked) == 6
    for found, wanted in zip(again, whole, strict=True):
        np.testing.assert_array_equal(found, wanted)
    (one,) = (path for path in (tmp_path / "whole" / "embeddings").glob("candidates-*"))
    (other,) = (path for path in (tmp_path / "stopped" / "embeddings").glob("candidates-*"))
    assert one.name == other.name
    assert (one / "progress.json").read_bytes() == (other / "progress.json").read_bytes()


def test_one_device_and_eight_say_the_same(root, model, expected, tmp_path):
    for found, wanted in zip(fixed(root, model, tmp_path, devices=1, rows=3), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_embedded_decides_where_it_is_kept(root, model, tmp_path):
    other = embedding_model.write(tmp_path / "other", seed=8, max_position_embeddings=128)
    fixed(root, model, tmp_path / "cache")
    fixed(root, other, tmp_path / "cache")
    fixed(root, model, tmp_path / "cache", targets__group_rows=2)
    kept = [path.name.split("-")[0] for path in (tmp_path / "cache" / "embeddings").iterdir()]
    assert sorted(kept) == ["candidates"] * 2 + ["targets"] * 3


def test_rows_of_documents_are_embedded_by_their_decoded_text(tmp_path, model):
    documents = tiny.write_domains(tmp_path / "documents", characters=1800, names=("digits", "vowels"))
    config = tiny_chat.documents(documents)
    domains, tokenizer = open_domains(config.data, progress=False)
    pool, targets = Pool(domains), open_targets(config, domains, "bytes")
    sides = (
        Embedded("candidates", pool, np.arange(pool.num_rows), tokenizer),
        Embedded("targets", targets.pool, targets.ids, tokenizer),
    )
    wanted = EmbeddingOptions(embedding_model=str(model)).signal("mean")
    cache = Cache(str(tmp_path / "cache"), "sampled")
    found, _ = fixed_embeddings([wanted], *sides, sweeper_of(8, None), cache, HOW)[wanted]
    texts = [bytes(t for t in pool.row(i).tokens[:-1] if t < 256).decode() for i in range(pool.num_rows)]
    np.testing.assert_allclose(found, of_texts(model, texts), atol=1e-5)


def saved(folder, name, values):
    np.save(folder / name, values, allow_pickle=True)
    return folder / name


def bad_files(folder):
    """By name: a file of candidates' embeddings, and what is said of it."""
    good = np.random.default_rng(1).normal(size=(67, WIDTH)).astype(np.float32)
    nan, zero, short = good.copy(), good.copy(), good[:60]
    nan[[5, 9], 2], zero[4] = np.nan, 0
    (folder / "text.npy").write_text("hello")
    (folder / "text.parquet").write_text("hello")
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"] * 67}), folder / "words.parquet")
    ragged = [[1.0, 2.0]] * 66 + [[1.0]]
    pyarrow.parquet.write_table(pyarrow.table({"a": ragged}), folder / "ragged.parquet")
    return {
        "width": (
            saved(folder, "width.npy", good[:, :5]),
            "target_embeddings.*of 16 numbers, but those of the candidates have 5",
        ),
        "count": (saved(folder, "count.npy", short), r"has 60 rows; one for each of 67 candidates is expected"),
        "nan": (saved(folder, "nan.npy", nan), r"2 of 67 rows are not finite, first row 5 \(from 0\)"),
        "zero": (saved(folder, "zero.npy", zero), r"a row is all zero, first row 4 \(from 0\)"),
        "objects": (saved(folder, "objects.npy", good.astype(object)), "not an .npy file of numbers"),
        "dtype": (saved(folder, "dtype.npy", np.full((67, 2), "x")), r"<U1 \[67, 2\]; numbers \[rows, width\] are"),
        "shape": (saved(folder, "shape.npy", good[0]), r"float32 \[16\]; numbers \[rows, width\] are expected"),
        "missing": (folder / "none.npy", "no such file"),
        "kind": (folder / "a.csv", r"must end in .npy or .parquet"),
        "text": (folder / "text.npy", "not an .npy file of numbers"),
        "no parquet": (folder / "text.parquet", "not a Parquet file"),
        "words": (folder / "words.parquet", r"has the columns a \(string\); one column of lists of numbers, or"),
        "ragged": (folder / "ragged.parquet", r"row 66 \(from 0\) has 1 numbers, the first one 2 numbers"),
    }


def test_files_that_cannot_be_used_are_one_line(root, files, tmp_path):
    for name, (path, message) in bad_files(tmp_path).items():
        targets = files["targets", "npy"]
        if name == "ragged":
            targets = saved(tmp_path, "two.npy", np.ones((11, 2)))
        with pytest.raises(InputError, match=message) as error:
            select(with_files(root, path, targets), [], None, 5)
        assert "\n" not in str(error.value)


def test_a_selector_that_asks_the_model_needs_a_checkpoint(root):
    for name in ("less", "near"):
        with pytest.raises(InputError, match="--checkpoint is missing: a run folder"):
            select(tiny_chat.config(root, selector=name), [], None, 5)
