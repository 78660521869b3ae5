"""Embeddings of candidates and targets, whosever they are: what near, tsds and rds compare."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable

import jax
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies import options
from dataflex_jax.policies.common import neighbours
from dataflex_jax.policies.common.influence import cosines
from dataflex_jax.policies.common.pooling import POOLINGS, side_by_side
from dataflex_jax.policies.signals import EXAMPLES, TARGETS, Embeddings, FixedEmbeddings, RowSet, Signals

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 16384
_cosines = jax.jit(cosines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """The hyperparameters of selectors that compare embeddings: whose they are, and how they are pooled.

    Attributes:
        pooling: of a row's hidden states: their "mean", the "last" one, or the "position_weighted" mean; None: the
            selector's own for the model in training, the "last" one of an embedding model.
        layers: after which layers the hidden states are taken, from 1, or from -1 at the end; those of several are put
            side by side. None: the last hidden states.
        embedding_model: a Hugging Face folder or hub id, or a run folder, whose embeddings are computed once and kept;
            it reads the rows' texts in the tokens of its own tokenizer. None: the model in training, as it is.
        target_prefix: text that the embedding model reads before each target, such as an instruction.
        candidate_embeddings: a file with the candidates' embeddings, a row each in incoming order, in place of a
            model's: .npy, or .parquet with one column of lists or one of numbers for each dimension.
        target_embeddings: likewise the targets'.
    """

    pooling: str | None = None
    layers: tuple[int, ...] | None = None
    embedding_model: str | None = None
    target_prefix: str = ""
    candidate_embeddings: str | None = None
    target_embeddings: str | None = None

    def __post_init__(self):
        if self.pooling is not None:
            options.one_of("pooling", self.pooling, tuple(POOLINGS))
        if self.layers is not None:
            accepted = "one or more layers, from 1, or from -1 at the end, or None"
            options.require("layers", self.layers, len(self.layers) > 0 and 0 not in self.layers, accepted)
        files = {name: getattr(self, name) for name in ("candidate_embeddings", "target_embeddings")}
        given = [name for name, file in files.items() if file is not None]
        if len(given) == 1 and self.embedding_model is None:
            other = next(name for name in files if name not in given)
            options.refuse(given[0], files[given[0]], f"needs {other} too, or the embedding_model that made it")
        unused = (
            dict.fromkeys(("embedding_model", "pooling", "layers"), "both sides have files") if len(given) == 2 else {}
        )
        if self.embedding_model is None or self.target_embeddings is not None:
            unused["target_prefix"] = "no embedding model reads the targets"
        for name, why in unused.items():
            if value := getattr(self, name):
                options.refuse(name, value, f"not used, {why}; leave it out")

    @property
    def fixed(self) -> bool:
        """Whether the embeddings stay as they are while the model learns."""
        return self.embedding_model is not None or self.candidate_embeddings is not None

    def signal(self, usual: str, *, whole: bool = False) -> Embeddings | FixedEmbeddings:
        """What to ask for.

        Args:
            usual: the selector's own pooling.
            whole: see `Embeddings`; of the model in training.
        """
        embed = POOLINGS[self.pooling or ("last" if self.fixed else usual)]
        then = None if self.layers is None else side_by_side
        layers = None if self.layers is None else tuple(self.layers)
        asked = Embeddings(embed, whole and not self.fixed, then, layers)
        if not self.fixed:
            return asked
        files = self.candidate_embeddings, self.target_embeddings
        return FixedEmbeddings(asked, self.embedding_model, self.target_prefix, *files)


def needs(signal: Embeddings | FixedEmbeddings) -> frozenset[Hashable]:
    """What a selector that compares such embeddings of candidates and targets needs."""
    return frozenset({TARGETS, EXAMPLES, *((signal,) if isinstance(signal, FixedEmbeddings) else ())})


def embedded(
    selector: str, signal: Embeddings | FixedEmbeddings, signals: Signals
) -> tuple[Float[np.ndarray, "M E"], Float[np.ndarray, "N E"]]:
    """Embeddings of the targets, without those that are zero or not finite, and of all candidates, float32.

    Args:
        selector: its name, for the errors.
        signal: what to ask for.
        signals: of the current model.

    Raises:
        InputError: no target set, no target with an embedding, or no such candidate.
    """
    if signals.targets is None:
        raise InputError(f"selector {selector!r} needs a target set to look for neighbours of")
    targets, candidates = (np.asarray(rows.sweep(signal), np.float32) for rows in (signals.targets, signals.candidates))
    targets = targets[neighbours.usable(targets)]
    for rows, what in ((targets, "target"), (candidates, "candidate")):
        if not neighbours.usable(rows).any():
            raise InputError(f"selector {selector!r}: no {what} has an embedding that is finite and not zero")
    return targets, candidates


def similarities(
    rows: RowSet, signal: Embeddings | FixedEmbeddings, directions: Float[Array, "M E"]
) -> Float[np.ndarray, "n M"]:
    """The cosine of each row's embedding with each direction of length 1; NaN for a row without one."""
    if isinstance(signal, Embeddings):
        then = cosines if signal.then is None else _cosines_side_by_side
        return rows.sweep(dataclasses.replace(signal, then=then), operand=directions)
    found = rows.sweep(signal)
    starts = range(0, rows.num_rows, _ROWS_AT_A_TIME)
    return np.concatenate([np.asarray(_cosines(found[i : i + _ROWS_AT_A_TIME], directions)) for i in starts])


def _cosines_side_by_side(embeddings: Float[Array, "B L E"], directions: Float[Array, "M D"]) -> Float[Array, "B M"]:
    return cosines(side_by_side(embeddings), directions)


def saying(selector: str) -> Callable[[str], None]:
    """Warns of what a selector did otherwise than asked, of each message once."""

    @functools.cache
    def say(message: str) -> None:
        logger.warning("%s: %s", selector, message)

    return say
