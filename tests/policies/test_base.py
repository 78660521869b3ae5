"""The vocabulary of policies."""

import pytest

from dataflex_jax import policies
from dataflex_jax.policies import registry
from dataflex_jax.policies.base import ScoreSource


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("loss", ScoreSource("loss")),
        ("selector", ScoreSource("selector")),
        ("field:meta.length", ScoreSource("field", "meta.length")),
        ("scores/loss.npy", ScoreSource("file", "scores/loss.npy")),
    ],
)
def test_a_score_source_is_read_and_said(text, source):
    assert ScoreSource.parse(text) == source
    assert str(source) == text


def test_the_room_shows_what_a_policy_is_written_with():
    assert all(hasattr(policies, name) for name in policies.__all__)
    assert {f"register_{kind}" for kind in registry.KINDS} <= set(policies.__all__)
    assert {kind.capitalize() for kind in registry.KINDS} <= set(policies.__all__)
