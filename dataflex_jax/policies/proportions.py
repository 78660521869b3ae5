"""Distributions over the domains."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.errors import InputError


def normalised(proportions: Sequence[float], num_domains: int, option: str) -> np.ndarray:
    """Checks and normalises mixture proportions.

    Args:
        proportions: one non-negative number a domain, not all zero; any scale.
        num_domains: K.
        option: the configuration field they come from, for the error.

    Returns:
        float64 [K] that sums to 1.

    Raises:
        InputError: wrong length, a negative or non-finite entry, or all zero.
    """
    weights = np.asarray(proportions, np.float64)
    if weights.shape != (num_domains,):
        raise InputError(f"{option} has {weights.size} entries; one for each of the {num_domains} domains is needed")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"{option} = {tuple(proportions)}: every entry must be a finite number >= 0")
    if weights.sum() <= 0:
        raise InputError(f"{option} = {tuple(proportions)}: at least one entry must be > 0")
    return weights / weights.sum()


def starting_proportions(
    proportions: Sequence[float] | str | None, natural: Float[Array, " K"], option: str
) -> Float[Array, " K"]:
    """The distribution that `proportions` means, float32.

    Args:
        proportions: one number a domain, "uniform", or None for the natural ones.
        natural: the domains' sizes or default proportions, of any scale.
        option: the configuration field that `proportions` comes from, for the error.

    Raises:
        InputError: as `normalised`, or a string other than "uniform".
    """
    num_domains = len(natural)
    if proportions is None:
        return jnp.asarray(natural / natural.sum(), jnp.float32)
    if isinstance(proportions, str):
        if proportions != "uniform":
            raise InputError(f'{option} = {proportions!r}: a tuple of numbers or "uniform" is accepted')
        return jnp.full((num_domains,), 1 / num_domains, jnp.float32)
    return jnp.asarray(normalised(proportions, num_domains, option), jnp.float32)
