"""dsir against the formula, one n-gram at a time."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.policies import TARGETS, TEXTS, Evidence
from dataflex_jax.policies.common.ngrams import Ngrams
from dataflex_jax.policies.selectors.dsir import Weighed, dsir
from tests.helpers.fake_signals import FakeRows, FakeSignals, request

CANDIDATES = ["the sum of two and two", "a river runs to the sea", "", "two times two is four", "the sea, the sea"]
TARGETS_TEXTS = ["what is two and two", "three times four is twelve"]


def signals(candidates=CANDIDATES, targets=TARGETS_TEXTS):
    return FakeSignals(FakeRows(written=candidates), None if targets is None else FakeRows(written=targets))


def transcription(longest, buckets):
    def found(text):
        return Ngrams(longest, buckets).of(text).tolist()

    def model(texts):
        counts = collections.Counter(bucket for text in texts for bucket in found(text))
        return lambda bucket: (counts[bucket] + 1) / (counts.total() + buckets)

    p, q = model(TARGETS_TEXTS), model(CANDIDATES)
    return [sum(math.log(p(b) / q(b)) for b in found(text)) if text else math.nan for text in CANDIDATES]


@pytest.mark.parametrize(("longest", "buckets"), [(2, 10000), (1, 7), (3, 500)])
def test_weights_equal_the_transcription(longest, buckets):
    selector = dsir(ngrams=longest, buckets=buckets)
    assert selector.needs == {TARGETS, TEXTS}
    state = selector.init(signals())
    evidence, after = selector.score(state, None, request())
    assert after is state
    np.testing.assert_allclose(evidence.rows.log_weight, transcription(longest, buckets), rtol=1e-5)


def test_what_is_like_the_targets_is_drawn_in_proportion_to_its_weight():
    selector, log_weights = dsir(), jnp.log(jnp.asarray([0.5, 0.1, 0.4]))
    evidence = Evidence(Weighed(log_weights))
    choose = jax.jit(selector.choose, static_argnums=2)
    first, again, other = (choose(evidence, request(seed=seed), 3) for seed in (1, 1, 4))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.ids.tolist() != other.ids.tolist()
    np.testing.assert_array_equal(first.scores, log_weights[first.ids])
    keys = jax.vmap(lambda seed: jax.random.key(seed))(jnp.arange(4000))
    drawn = jax.vmap(lambda key: selector.choose(evidence, request()._replace(key=key), 1).ids[0])(keys)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.5, 0.1, 0.4], atol=0.03)


@pytest.mark.parametrize(("targets", "words"), [(None, "needs a target set"), (["", " "], "the targets have no words")])
def test_nothing_to_compare_with_is_refused(targets, words):
    with pytest.raises(InputError, match=words):
        dsir().init(signals(targets=targets))


@pytest.mark.parametrize(("option", "value"), [("ngrams", 0), ("ngrams", 9), ("buckets", 0)])
def test_impossible_hyperparameters_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} = "):
        dsir(**{option: value})
