"""The lines of text of what was scored highest and lowest, and what a selection's file says of lengths."""

import json
from types import SimpleNamespace

import numpy as np

from dataflex_jax.data.rows import Row
from dataflex_jax.selection.choosing import Chosen, write_selection
from dataflex_jax.selection.extremes import MOST, extremes, write_extremes

SCORES = np.random.default_rng(0).permutation(60).astype(np.float32) / 4
SCORES[[3, 40]] = np.nan
LENGTHS = np.arange(60) % 7 + 1


class TwoDomains:
    """60 rows, 30 a domain: row i is the letter i % 26, as often as it is long and once more."""

    domains = (SimpleNamespace(name="a"), SimpleNamespace(name="b"))
    num_rows = 60

    def domain_of(self, ids):
        return np.asarray(ids) // 30

    def records(self):
        return np.arange(60) + 100

    def lengths(self):
        return LENGTHS

    def length(self, i):
        return int(LENGTHS[i])

    def row(self, i):
        return Row(np.full(LENGTHS[i] + 1, i % 26), np.ones(LENGTHS[i], bool))


def decode(ids):
    return "".join(chr(ord("a") + int(i)) for i in ids)


def chosen():
    ids = np.argsort(-np.nan_to_num(SCORES, nan=-1), kind="stable")[:5]
    return Chosen(ids, SCORES[ids], SCORES, (slice(0, 5),), (5,), 2)


def test_the_highest_and_the_lowest_are_told_with_their_text(tmp_path):
    write_extremes(tmp_path / "x.jsonl", TwoDomains(), chosen(), decode)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    ranked = sorted((i for i in range(60) if np.isfinite(SCORES[i])), key=lambda i: SCORES[i])
    assert [line["id"] for line in lines] == [*ranked[::-1][:MOST], *ranked[:MOST]]
    assert [line["end"] for line in lines] == ["highest"] * MOST + ["lowest"] * MOST
    assert [line["chosen"] for line in lines] == [True] * 5 + [False] * 15
    for line in lines:
        i = line["id"]
        assert line["score"] == SCORES[i]
        assert (line["domain"], line["record"], line["length"]) == ("ab"[i // 30], 100 + i, LENGTHS[i])
        assert line["text"] == "abcdefghijklmnopqrstuvwxyz"[i % 26] * (LENGTHS[i] + 1)


def test_a_long_text_is_cut_and_documents_have_no_record(monkeypatch):
    pool = TwoDomains()
    monkeypatch.setattr(pool, "records", lambda: None, raising=False)
    monkeypatch.setattr(pool, "row", lambda i: Row(np.zeros(5000, int), np.ones(4999, bool)), raising=False)
    line = extremes(pool, chosen(), lambda ids: "long" * len(ids))[0]
    assert line["record"] is None
    assert line["text"] == "long" * 100


def test_a_selections_file_has_the_lengths_of_the_chosen_and_of_the_pool(tmp_path):
    write_selection(tmp_path / "x.npz", TwoDomains(), chosen(), all_scores=False)
    arrays = np.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(arrays["lengths"], LENGTHS[arrays["ids"]])
    expected = {length: int((length == LENGTHS).sum()) for length in range(1, 8)}
    assert dict(zip(arrays["pool_lengths"].tolist(), arrays["pool_rows"].tolist(), strict=True)) == expected
