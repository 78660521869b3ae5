"""Hashed n-grams against plain counting, and the hashes against values that must never change."""

import collections

import numpy as np
import pytest

from dataflex_jax.policies.common import ngrams
from dataflex_jax.policies.common.ngrams import Ngrams

TEXT = "The cat -- the CAT, she said -- sat."
WORDS = ["the", "cat", "--", "the", "cat", ",", "she", "said", "--", "sat", "."]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_equal_n_grams_and_no_others_share_a_bucket(longest):
    found = Ngrams(longest, 2**40).of(TEXT).tolist()
    expected = [tuple(WORDS[i : i + n]) for n in range(1, longest + 1) for i in range(len(WORDS) - n + 1)]
    assert len(found) == len(expected)
    assert len({*zip(found, expected, strict=True)}) == len(set(found)) == len(set(expected))


def test_buckets_are_the_same_in_every_process():
    assert Ngrams(2, 10000).of("Grüße, Ada").tolist() == [1438, 8881, 5942, 5843, 6663]


def test_order_and_neighbours_count():
    a, b = Ngrams(2, 2**40).of("red wine"), Ngrams(2, 2**40).of("wine red")
    assert set(a[:2]) == set(b[:2])
    assert a[2] != b[2]


def test_buckets_are_used_evenly():
    counts = Ngrams(2, 50).counts(" ".join(f"w{i}" for i in range(row, row + 100)) for row in range(0, 2000, 100))
    assert counts.sum() == 20 * 199
    assert 0.5 < counts.min() / counts.mean() < counts.max() / counts.mean() < 1.5


def test_counts_and_sums_are_over_all_n_grams():
    texts, made, values = [TEXT, "", "she sat", "\n "], Ngrams(2, 37), np.random.default_rng(0).normal(size=37)
    by_bucket = collections.Counter(bucket for text in texts for bucket in made.of(text).tolist())
    assert made.counts(texts).tolist() == [by_bucket[bucket] for bucket in range(37)]
    expected = [sum(values[bucket] for bucket in made.of(text)) if text.strip() else np.nan for text in texts]
    np.testing.assert_allclose(made.sums(texts, values), expected)


def test_forgotten_words_have_the_same_hashes_again(monkeypatch):
    expected = Ngrams(2, 1000).of(TEXT)
    monkeypatch.setattr(ngrams, "_MOST_WORDS", 3)
    np.testing.assert_array_equal(Ngrams(2, 1000).of(TEXT), expected)


def test_any_text_is_read():
    assert len(Ngrams(1, 10).of("half a pair \ud800 \x00 \u4f60\u597d")) == 6
