"""The selector that chooses nothing."""

from dataflex_jax.policies.selectors.full import full


def test_full_has_nothing_to_choose():
    assert full().score is None
    assert full().choose is None
