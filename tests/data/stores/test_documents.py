import hashlib
import itertools
import json
import os
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from ml_collections import ConfigDict

from dataflex_jax.data.stores.documents import open_document_stores
from dataflex_jax.errors import InputError
from tests.helpers import foreign_tokenizer

TEXTS = {name: [f"{name} document {i} " + "word " * (i % 7) for i in range(60)] for name in ("a", "b")}


def config(tmp_path, **fields):
    return ConfigDict(
        {
            "source": "local",
            "root": str(tmp_path / "root"),
            "domains": None,
            "domain_field": None,
            "domain_values": None,
            "max_samples": None,
            "weight_key": None,
            "hub_config": None,
            "hub_split": "train",
            "text_field": "text",
            "formatting": None,
            "tokenizer": "bytes",
            "eos_token": None,
            "begin_of_text": None,
            "valid_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
            "on_bad_record": "raise",
            "verify": "sampled",
        }
        | fields
    )


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": record} if isinstance(record, str) else record for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def root(tmp_path):
    for name, texts in TEXTS.items():
        write_jsonl(tmp_path / "root" / f"{name}.jsonl", texts)
    return tmp_path / "root"


def open_quietly(data):
    return open_document_stores(data, progress=False)


def documents(array):
    """The texts of a byte-tokenized split."""
    tokens = [array.tokens[start:end] for start, end in zip(array.offsets[:-1], array.offsets[1:], strict=True)]
    assert all(t[-1] == 256 for t in tokens)
    return [bytes(t[:-1].astype(np.uint8)).decode() for t in tokens]


def snapshot(folder):
    """{relative path: digest} of all stores under a cache folder."""
    stores = Path(folder) / "stores"
    files = (path for path in stores.rglob("*") if path.is_file())
    return {str(path.relative_to(stores)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_stores_hold_every_document_once(tmp_path, root):
    stores, tokenizer = open_quietly(config(tmp_path))
    assert [store.name for store in stores] == ["a", "b"]
    for store in stores:
        train, valid = documents(store.train), documents(store.valid)
        assert sorted(train + valid) == sorted(TEXTS[store.name])
        assert 4 <= len(valid) <= 22
        assert train == [text for text in TEXTS[store.name] if text in set(train)]
        for array, texts in ((store.train, train), (store.valid, valid)):
            assert array.num_documents == len(texts)
            assert array.num_bytes == sum(len(text.encode()) for text in texts)
            assert array.num_tokens == len(array.tokens) == array.num_bytes + array.num_documents
    assert tokenizer.eos_id == 256


def test_rows_cover_all_tokens_but_the_last_partial_row(tmp_path, root):
    (store, _), _ = open_quietly(config(tmp_path))
    tokens = np.asarray(store.train.tokens)
    for seq_len in (1, 7, 64, len(tokens) - 1):
        rows = [store.train.row(i, seq_len) for i in range(store.train.num_rows(seq_len))]
        assert all(row.shape == (seq_len + 1,) and row.dtype == np.int32 for row in rows)
        inputs, targets = np.concatenate([r[:-1] for r in rows]), np.concatenate([r[1:] for r in rows])
        np.testing.assert_array_equal(inputs, tokens[: len(inputs)])
        np.testing.assert_array_equal(targets, tokens[1 : len(inputs) + 1])
        assert 0 <= len(tokens) - 1 - len(inputs) < seq_len
    assert store.train.num_rows(len(tokens)) == 0
    for i in (-1, store.train.num_rows(64)):
        with pytest.raises(IndexError, match=f"row {i} of"):
            store.train.row(i, 64)


def test_arrays_pickle_without_their_tokens(tmp_path, root):
    (store, _), _ = open_quietly(config(tmp_path))
    row = store.train.row(1, 16)
    pickled = pickle.dumps(store)
    assert len(pickled) < 2000
    loaded = pickle.loads(pickled)
    assert loaded == store
    np.testing.assert_array_equal(loaded.train.row(1, 16), row)


def test_restart_reads_no_input_file(tmp_path, root, monkeypatch):
    first, _ = open_quietly(config(tmp_path))
    monkeypatch.setattr(
        "dataflex_jax.data.sources.parts.read_records", lambda *_: pytest.fail("an input file was read")
    )
    for name in ("a", "b"):
        (root / f"{name}.jsonl").chmod(0o000)
    if os.geteuid() == 0:  # whom permissions do not stop
        monkeypatch.setattr(
            "dataflex_jax.data.stores.hashes.open", lambda *_, **__: pytest.fail("hashed again"), raising=False
        )
    assert open_quietly(config(tmp_path))[0] == first


def test_added_domain_leaves_the_others_alone(tmp_path, root):
    before, _ = open_quietly(config(tmp_path))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "stores").rglob("*")}
    write_jsonl(root / "c.jsonl", [f"new {i}" for i in range(20)])
    after, _ = open_quietly(config(tmp_path))
    assert after[:2] == before
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_changed_input_option_or_tokenizer_is_another_store(tmp_path, root):
    seen = {open_quietly(config(tmp_path))[0][0].key}
    text = (root / "a.jsonl").read_text()
    (root / "a.jsonl").write_text(text.replace("document 3", "document X"))
    for fields in ({}, {"valid_fraction": 0.3}, {"tokenizer": "train:300"}):
        store, _ = open_quietly(config(tmp_path, **fields))[0]
        assert store.key not in seen
        seen.add(store.key)
    (root / "a.jsonl").write_text(text)
    assert open_quietly(config(tmp_path))[0][0].key in seen


def test_documents_begin_as_their_tokenizer_says(tmp_path, root):
    tokenizer = str(foreign_tokenizer.write(tmp_path / "tokenizer"))
    (begun, *_), _ = open_quietly(config(tmp_path, tokenizer=tokenizer))
    (plain, *_), _ = open_quietly(config(tmp_path, tokenizer=tokenizer, begin_of_text=False))
    (other, *_), _ = open_quietly(config(tmp_path, tokenizer=str(foreign_tokenizer.write(tmp_path / "o", begin=False))))
    assert begun.key != plain.key == other.key  # only where the tokens change
    for number, (start, end) in enumerate(itertools.pairwise(plain.train.offsets)):
        without = plain.train.tokens[start:end].tolist()
        assert begun.train.tokens[start + number : end + number + 1].tolist() == [foreign_tokenizer.BEGIN, *without]
        assert without[-1] == foreign_tokenizer.END
    # A byte of text is no more of them.
    assert begun.train.num_tokens == plain.train.num_tokens + plain.train.num_documents
    assert begun.train.num_bytes == plain.train.num_bytes


def test_duplicates_land_on_one_side_and_the_split_ignores_order(tmp_path, root):
    write_jsonl(root / "a.jsonl", TEXTS["a"] * 2)
    write_jsonl(root / "b.jsonl", TEXTS["a"][::-1])
    (a, b), _ = open_quietly(config(tmp_path))
    assert set(documents(a.train)).isdisjoint(documents(a.valid))
    assert set(documents(a.valid)) == set(documents(b.valid))
    assert a.valid.num_documents == 2 * b.valid.num_documents


def test_own_held_out_file_decides_and_its_texts_leave_training(tmp_path, root):
    write_jsonl(root / "a.valid.jsonl", ["held out", TEXTS["a"][5]])
    (a, _), _ = open_quietly(config(tmp_path))
    assert documents(a.valid) == ["held out", TEXTS["a"][5]]
    assert documents(a.train) == [text for text in TEXTS["a"] if text != TEXTS["a"][5]]
    meta = json.loads((Path(a.path) / "meta.json").read_text())
    assert meta["held_out_duplicates"] == 1


def test_trained_tokenizer_never_sees_held_out_text(tmp_path, root):
    write_jsonl(root / "a.valid.jsonl", ["zqzqzqzq " * 50])
    tokenizer = open_quietly(config(tmp_path, tokenizer="train:400"))[1]
    (ids,) = tokenizer.encode_batch(["zqzqzq"])
    assert len(ids) == 6


RECORDS = [{"text": f"text {i}", "meta": {"set": "XYZ"[i % 3]}} for i in range(90)]


def test_domain_field_splits_one_stream(tmp_path):
    write_jsonl(tmp_path / "root" / "1.jsonl", RECORDS[:50])
    write_jsonl(tmp_path / "root" / "2.jsonl", RECORDS[50:])
    named = {"domain_field": "meta.set", "domains": ("y", "x"), "domain_values": ("Y", "X")}
    (y, x), _ = open_quietly(config(tmp_path, **named))
    for store, letter in ((y, "Y"), (x, "X")):
        expected = [record["text"] for record in RECORDS if record["meta"]["set"] == letter]
        assert sorted(documents(store.train) + documents(store.valid)) == sorted(expected)
    meta = json.loads((Path(x.path) / "meta.json").read_text())
    assert meta["records_by_value"] == {"X": 30, "Y": 30, "Z": 30}
    found, _ = open_quietly(config(tmp_path, domain_field="meta.set"))
    assert [store.name for store in found] == ["X", "Y", "Z"]
    np.testing.assert_array_equal(found[0].train.tokens, x.train.tokens)


def test_missing_value_of_the_domain_field_lists_those_found(tmp_path):
    write_jsonl(tmp_path / "root" / "1.jsonl", RECORDS)
    with pytest.raises(InputError, match=r"domain 'W' has no training documents.*found: 'X', 'Y', 'Z'"):
        open_quietly(config(tmp_path, domain_field="meta.set", domains=("X", "W")))
    with pytest.raises(InputError, match=r"1.jsonl:1: no field 'meta.nothing' .*; field 'meta' has set"):
        open_quietly(config(tmp_path, domain_field="meta.nothing", on_bad_record="skip"))


def test_saved_hub_dataset(tmp_path):
    splits = {"train": RECORDS[:80], "validation": RECORDS[80:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "corpus"))
    stores, _ = open_quietly(
        config(tmp_path, source="hub", root=str(tmp_path / "corpus"), domain_field="meta.set", domains=("X",))
    )
    assert documents(stores[0].train) == [r["text"] for r in RECORDS[:80] if r["meta"]["set"] == "X"]
    assert documents(stores[0].valid) == [r["text"] for r in RECORDS[80:] if r["meta"]["set"] == "X"]


def test_builtin_corpus(tmp_path):
    (store,), _ = open_quietly(config(tmp_path, source="builtin", root=None, domains=("reference",)))
    assert store.name == "reference"
    assert store.train.num_bytes > 100_000


def test_bad_records_stop_the_run_or_are_counted(tmp_path, root):
    with open(root / "a.jsonl", "a") as file:
        file.write('{"text": 1}\n{"text"\n{"text": " "}\n')
    line = rf"{root}/a.jsonl:61: field 'text' .* must be a string but is int"
    with pytest.raises(InputError, match=line + r" \(data.on_bad_record='skip' passes over bad records\)$"):
        open_quietly(config(tmp_path))
    a, b = open_quietly(config(tmp_path, on_bad_record="skip"))[0]
    assert (a.skipped_records, b.skipped_records) == (2, 0)
    assert a.train.num_documents + a.valid.num_documents == 60
    with pytest.raises(InputError, match=line):
        open_quietly(config(tmp_path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([" ", ""], "domain 'a' has no training documents; 2 documents are empty"),
        ([{"body": "x"}], r"domain 'a' has no training documents; 1 records were skipped as bad"),
    ],
)
def test_domain_without_documents(tmp_path, root, lines, message):
    write_jsonl(root / "a.jsonl", lines)
    with pytest.raises(InputError, match=message):
        open_quietly(config(tmp_path, on_bad_record="skip"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_bad_record": "ignore"}, "config.data.on_bad_record = 'ignore': must be one of 'raise', 'skip'"),
        ({"valid_fraction": 1.0}, "config.data.valid_fraction = 1.0: must be a number >= 0 and < 1"),
        ({"cache_dir": None}, "config.data.cache_dir = None: needs a folder"),
    ],
)
def test_bad_options(tmp_path, root, fields, message):
    with pytest.raises(InputError, match=message):
        open_quietly(config(tmp_path, **fields))


def test_cache_dir_that_is_a_file(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^config.data.cache_dir: .*/file is not a writable folder: File exists"):
        open_quietly(config(tmp_path, cache_dir=str(tmp_path / "file")))


def test_empty_held_out_split_warns_and_reads_as_empty(tmp_path, root, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        "dataflex_jax.data.stores.cache.logger.warning", lambda message, *values: warnings.append(message % values)
    )
    (a, _), _ = open_quietly(config(tmp_path, valid_fraction=1e-9))
    assert warnings == ["domain a, b: no held-out document; raise data.valid_fraction for evaluation"]
    assert a.valid.num_rows(8) == 0
    assert (len(a.valid.tokens), list(a.valid.offsets)) == (0, [0])


def test_many_domains_are_one_line_without_held_out_documents_that_nobody_wants(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    for number in range(30):
        (tmp_path / "root" / f"n{number}.jsonl").write_text('{"text": "' + 40 * "x" + '"}\n')
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(f"dataflex_jax.data.stores.cache.logger.{level}", lambda text, *of: lines.append(text % of))
    open_quietly(config(tmp_path, valid_fraction=0.0, domains=None))
    assert lines == ["30 domains: train 30 documents, 1,230 tokens; held out 0 documents, 0 tokens"]


def test_a_line_a_domain_says_what_was_read_and_one_what_was_not(tmp_path, root, monkeypatch):
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            f"dataflex_jax.data.stores.cache.logger.{level}", lambda message, *values: said.append(message % values)
        )
    write_jsonl(root / "b" / "more.valid.jsonl", [TEXTS["b"][3], "held out"])
    write_jsonl(root / "b" / "b.jsonl", [*TEXTS["b"], "", {"body": "x"}, {"text": 1}])
    (root / "b.jsonl").unlink()
    open_quietly(config(tmp_path, on_bad_record="skip"))
    said = [line for line in said if line.startswith("domain ")]
    assert [line.split(":")[0] for line in said] == ["domain a", "domain b", "domain b"]
    assert said[0].endswith(" tokens; of 1 file")
    assert re.fullmatch(r"domain b: train 59 documents, .* bytes; held out 2 documents, .* tokens; of 2 files", said[1])
    left_out = "2 bad records, 1 empty documents, 1 training documents that are held out too"
    assert said[2] == f"domain b: left out: {left_out}"


def test_damaged_store_is_built_again(tmp_path, root):
    (a, _), _ = open_quietly(config(tmp_path))
    before = snapshot(tmp_path / "cache")
    with open(f"{a.train.path}.tokens", "ab") as file:
        file.truncate(10)
    open_quietly(config(tmp_path))
    assert snapshot(tmp_path / "cache") == before


def test_wide_vocabulary_is_stored_wider(tmp_path, root, monkeypatch):
    narrow = open_quietly(config(tmp_path))[0][0]
    monkeypatch.setattr("dataflex_jax.data.stores.build._NARROW_VOCABULARY", 256)
    wide = open_quietly(config(tmp_path, cache_dir=str(tmp_path / "wide")))[0][0]
    assert (narrow.train.tokens.dtype, wide.train.tokens.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(narrow.train.tokens, wide.train.tokens)
