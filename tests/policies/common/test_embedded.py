"""Whose embeddings selectors compare, and how the layers' are put side by side."""

import numpy as np
import pytest

from dataflex_jax.policies.common import pooling
from dataflex_jax.policies.common.embedded import EmbeddingOptions, embedded, needs, similarities
from dataflex_jax.policies.common.influence import unit
from dataflex_jax.policies.signals import EXAMPLES, TARGETS, Embeddings, FixedEmbeddings
from tests.helpers.fake_signals import FakeRows, FakeSignals

FILES = {"candidate_embeddings": "c.npy", "target_embeddings": "t.npy"}
LAYERS, TOKENS, WIDTH = 3, 4, 5


def rows(n, seed):
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (n, 1))).astype(np.float32)
    return FakeRows(hidden=rng.normal(size=(n, LAYERS, TOKENS, WIDTH)).astype(np.float32), mask=mask)


def side_by_side(source, numbers):
    """In float64: each layer's mean of length 1, one behind the other, of length 1 again."""
    mask, found = source.mask[:, :, None].astype(np.float64), []
    for number in numbers:
        mean = (source.hidden[:, number].astype(np.float64) * mask).sum(axis=1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found, axis=1) / np.sqrt(len(numbers))


def test_several_layers_are_put_side_by_side():
    signals = FakeSignals(rows(9, 0), rows(4, 1))
    signal = EmbeddingOptions(layers=(1, -1)).signal("mean")
    targets, candidates = embedded("near", signal, signals)
    expected = [side_by_side(source, (0, 2)) for source in (signals.targets, signals.candidates)]
    np.testing.assert_allclose(targets, expected[0], atol=1e-6)
    np.testing.assert_allclose(candidates, expected[1], atol=1e-6)
    found = similarities(signals.candidates, signal, unit(targets))
    np.testing.assert_allclose(found, expected[1] @ expected[0].T, atol=1e-6)


def test_by_default_the_model_in_training_is_asked_as_the_selector_has_it():
    shared = EmbeddingOptions()
    assert not shared.fixed
    assert shared.signal("position_weighted", whole=True) == Embeddings(pooling.position_weighted_mean, whole=True)
    assert EmbeddingOptions(pooling="last").signal("mean") == Embeddings(pooling.last_token)
    assert needs(shared.signal("mean")) == {TARGETS, EXAMPLES}


def test_an_embedding_model_is_read_off_its_last_token():
    shared = EmbeddingOptions(embedding_model="some/model", target_prefix="Query:")
    signal = shared.signal("mean", whole=True)
    assert signal == FixedEmbeddings(Embeddings(pooling.last_token), "some/model", "Query:")
    assert needs(signal) == {TARGETS, EXAMPLES, signal}
    assert EmbeddingOptions(embedding_model="some/model", pooling="mean").signal("mean").of.embed is pooling.mean


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"candidate_embeddings": "c.npy"},
            "candidate_embeddings = 'c.npy': needs target_embeddings too, or the embed",
        ),
        ({"target_embeddings": "t.npy"}, "target_embeddings = 't.npy': needs candidate_embeddings too, or the embed"),
        (FILES | {"embedding_model": "m"}, "embedding_model = 'm': not used, both sides have files"),
        (FILES | {"pooling": "mean"}, "pooling = 'mean': not used"),
        (FILES | {"layers": (1,)}, r"layers = \(1,\): not used"),
        ({"target_prefix": "Q"}, "target_prefix = 'Q': not used"),
        ({"embedding_model": "m", "target_embeddings": "t", "target_prefix": "Q"}, "target_prefix = 'Q': not used"),
        ({"layers": ()}, r"layers = \(\): must be one or more layers"),
        ({"layers": (0, 1)}, r"layers = \(0, 1\): must be one or more layers"),
        ({"pooling": "max"}, "pooling = 'max': must be one of position_weighted, mean, last"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EmbeddingOptions(**given)
