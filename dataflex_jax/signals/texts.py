"""What another model than the one in training says of texts, which its own tokenizer makes tokens of."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.listed import input_rows
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.models.model import Model
from dataflex_jax.signals.sweep import Sweeper, source

# Pure; its results have the batch's rows as leading axis, and must not depend on how far a row is padded.
OfBatch = Callable[[Model, Batch], PyTree]


class TextModel(NamedTuple):
    """A model that is asked about texts, such as an embedding or a reward model.

    Attributes:
        model: with its parameters, on the sweeper's mesh.
        tokenizer: its own.
        sweeper: runs it.
    """

    model: Model
    tokenizer: Tokenizer
    sweeper: Sweeper

    @property
    def longest(self) -> int:
        """Tokens that it takes of a text."""
        return self.model.config.max_position_embeddings

    def of_texts(self, function: OfBatch, texts: Sequence[str], description: str) -> PyTree:
        """`function` of each text, cut at `longest` tokens; see `Tokenizer.encode_whole` and `of_tokens`."""
        return self.of_tokens(function, self.tokenizer.encode_whole(texts, self.longest), description)

    def of_tokens(self, function: OfBatch, encoded: Sequence[Sequence[int]], description: str) -> PyTree:
        """`function` of texts given as tokens, all of which are inputs.

        Args:
            function: of (model, batch). Compiled anew if it is another object.
            encoded: the tokens of each text.
            description: for the progress bar.

        Returns:
            NumPy arrays with an entry a text, in order.
        """
        rows = source(input_rows(encoded).pool(), self.sweeper.mesh)
        return self.sweeper.run(function, self.model, rows, np.arange(len(encoded)), description)
