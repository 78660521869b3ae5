"""Embeddings of candidates and targets under the current model: what near and tsds search in."""

import functools
import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies.common import neighbours
from dataflex_jax.policies.common.pooling import POOLINGS
from dataflex_jax.policies.signals import Embeddings, Signals

logger = logging.getLogger(__name__)


def embedded(selector: str, how: str, signals: Signals) -> tuple[Float[np.ndarray, "M E"], Float[np.ndarray, "N E"]]:
    """Embeddings of the targets, without those that are zero or not finite, and of all candidates, float32.

    Args:
        selector: its name, for the errors.
        how: one of `POOLINGS`.
        signals: of the current model.

    Raises:
        InputError: no target set, no target with an embedding, or no such candidate.
    """
    if signals.targets is None:
        raise InputError(f"selector {selector!r} needs a target set to look for neighbours of")
    signal = Embeddings(POOLINGS[how])
    targets, candidates = (np.asarray(rows.sweep(signal), np.float32) for rows in (signals.targets, signals.candidates))
    targets = targets[neighbours.usable(targets)]
    for rows, what in ((targets, "target"), (candidates, "candidate")):
        if not neighbours.usable(rows).any():
            raise InputError(f"selector {selector!r}: no {what} has an embedding that is finite and not zero")
    return targets, candidates


def saying(selector: str) -> Callable[[str], None]:
    """Warns of what a selector did otherwise than asked, of each message once."""

    @functools.cache
    def say(message: str) -> None:
        logger.warning("%s: %s", selector, message)

    return say
