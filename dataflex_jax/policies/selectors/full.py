"""The whole pool, always: the control without selection."""

from dataflex_jax.policies import Selector, register_selector


@register_selector("full")
def full() -> Selector:
    """Never chooses: training goes through the pool in epochs, as without a selector."""
    return Selector(score=None, choose=None)
