"""Hashed n-grams of words: texts as numbers of buckets, and how often each bucket occurs."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

_TOKEN = re.compile(r"\w+|[^\w\s]+")
_MOST_WORDS = 2**20  # whose hashes are remembered
# The constants of splitmix64 (Steele, Lea and Flood 2014).
_STEP, _MIXERS = np.uint64(0x9E3779B97F4A7C15), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Ngrams:
    """Texts as buckets that their n-grams are hashed to; the same in every process, on every machine.

    Words are runs of letters, digits and underscores, or of other characters between white space, in lower case. The
    hash of a word is 64 bits of BLAKE2b, that of an n-gram mixes those of its words in their order.

    Args:
        longest: n-grams of 1 to so many words.
        buckets: how many.
    """

    def __init__(self, longest: int, buckets: int):
        self.longest, self.buckets = longest, buckets
        self._hashes: dict[str, int] = {}

    def of(self, text: str) -> Int[np.ndarray, " m"]:
        """The bucket of each n-gram of a text: those of the words, then those of the pairs, and so on."""
        words = np.array([self._hash(word) for word in _TOKEN.findall(text.lower())], np.uint64)
        hashes, parts = words, [words]
        for length in range(2, self.longest + 1):
            hashes = _mixed(hashes[:-1]) + words[length - 1 :]
            parts.append(hashes)
        return (_mixed(np.concatenate(parts)) % np.uint64(self.buckets)).astype(np.int64)

    def counts(self, texts: Iterable[str]) -> Int[np.ndarray, " buckets"]:
        """How often each bucket occurs in all texts."""
        total = np.zeros(self.buckets, np.int64)
        for text in texts:
            total += np.bincount(self.of(text), minlength=self.buckets)
        return total

    def sums(self, texts: Iterable[str], values: Float[np.ndarray, " buckets"]) -> Float[np.ndarray, " n"]:
        """The sum of the values of each text's buckets, float64; NaN for a text without words."""
        buckets = (self.of(text) for text in texts)
        return np.array([values[found].sum() if len(found) else np.nan for found in buckets])

    def _hash(self, word: str) -> int:
        found = self._hashes.get(word)
        if found is None:
            if len(self._hashes) >= _MOST_WORDS:
                self._hashes.clear()
            # Texts may have lone surrogates, which UTF-8 has not.
            content = word.encode("utf-8", "surrogatepass")
            found = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            self._hashes[word] = found
        return found


def _mixed(hashes: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    mixed = hashes + _STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIXERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIXERS[1]
    return mixed ^ (mixed >> np.uint64(31))
