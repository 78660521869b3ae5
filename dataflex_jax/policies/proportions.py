"""Distributions over the domains."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dataflex_jax.policies import options

# Of a hyperparameter: a number a domain, (name, number) pairs, "uniform" or a weights file. A run has numbers in place
# of the pairs and the file before a policy's `init` sees them.
Proportions = tuple[float, ...] | tuple[tuple[str, float], ...] | str | None


def normalised(name: str, proportions: Sequence[float], num_domains: int) -> Float[np.ndarray, " K"]:
    """Checks and normalises mixture proportions.

    Args:
        name: of the hyperparameter, for the error.
        proportions: one non-negative number a domain, not all zero; any scale.
        num_domains: K.

    Returns:
        float64 [K] that sums to 1.

    Raises:
        ValueError: wrong length, a negative or non-finite entry, or all zero.
    """
    try:
        weights = np.asarray(proportions, np.float64)
    except ValueError:
        options.refuse(name, proportions, "every entry must be a finite number >= 0")
    if weights.shape != (num_domains,):
        reason = f"has {weights.size} entries; one for each of the {num_domains} domains is needed"
        options.refuse(name, proportions, reason)
    if not np.isfinite(weights).all() or (weights < 0).any():
        options.refuse(name, proportions, "every entry must be a finite number >= 0")
    if weights.sum() <= 0:
        options.refuse(name, proportions, "at least one entry must be > 0")
    return weights / weights.sum()


def starting_proportions(name: str, proportions: Proportions, natural: Float[Array, " K"]) -> Float[Array, " K"]:
    """The distribution that a hyperparameter means, float32.

    Args:
        name: of the hyperparameter, for the error.
        proportions: one number a domain, "uniform", or None for the natural ones.
        natural: the domains' sizes or default proportions, of any scale; a domain that has 0 there has 0 in any case.

    Raises:
        ValueError: as `normalised`, a string other than "uniform", or nothing for the domains that are drawn.
    """
    num_domains = len(natural)
    if proportions is None:
        return jnp.asarray(natural / natural.sum(), jnp.float32)
    if isinstance(proportions, str):
        options.require(name, proportions, proportions == "uniform", 'a tuple of numbers or "uniform"')
        weights = jnp.full((num_domains,), 1 / num_domains, jnp.float32)
    else:
        weights = jnp.asarray(normalised(name, proportions, num_domains), jnp.float32)
    drawn = np.asarray(natural) > 0
    some = bool((np.asarray(weights)[drawn] > 0).any())
    options.require(name, proportions, some, "> 0 for a domain that the run draws from")
    return only(weights, drawn)


def only(weights: Float[Array, " K"], drawn: Bool[Array, " K"]) -> Float[Array, " K"]:
    """The weights with 0 for domains that are not drawn, the others scaled up to the same sum; as they are if all are.

    Where the domains that are drawn have nothing, each of them has the same.
    """
    kept = jnp.where(drawn, weights, 0.0)
    kept = jnp.where(jnp.sum(kept) > 0, kept, drawn.astype(kept.dtype))
    return jnp.where(jnp.all(drawn), weights, kept * (jnp.sum(weights) / jnp.sum(kept)))


def all_positive(name: str, proportions: Proportions, weights: Float[Array, " K"], natural: Float[Array, " K"]) -> None:
    """Refuses proportions without which the losses of a domain are never seen that the run draws from.

    Args:
        name: of the hyperparameter.
        proportions: its value.
        weights: the distribution that it means.
        natural: the run's proportions.

    Raises:
        ValueError: a weight of 0.
    """
    holds = bool(jnp.all((weights > 0) | (jnp.asarray(natural) <= 0)))
    options.require(name, proportions, holds, "> 0 for every domain, or its losses are never seen")
