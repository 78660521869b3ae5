"""The target set's embeddings under the current model, which several weighters compare their rows with."""

import numpy as np
from jaxtyping import Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies.signals import Embed, Embeddings, Signals

TOKENS = ("inputs", "all")


def mean_target(weighter: str, embed: Embed, signals: Signals, *, whole: bool = False) -> Float[np.ndarray, " E"]:
    """Mean of `embed` over the whole target set, float32.

    Args:
        weighter: its name, for the error.
        embed: of one row's last hidden states.
        signals: of the current model.
        whole: see `Embeddings`.

    Raises:
        InputError: there is no target set.
    """
    if signals.targets is None:
        raise InputError(f"weighter {weighter!r} needs a target set to compare the rows with")
    return np.mean(signals.targets.sweep(Embeddings(embed, whole)), axis=0, dtype=np.float64).astype(np.float32)
