"""Text that a model goes on with, up to where one of some strings comes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.harness.plan import Tokens, bucket
from dataflex_jax.models.generation.generate import generate
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import row_shards

_FIRST_TOKENS = 32  # of a text, before strings are looked for in it; then twice as many, and so on
_ROWS = 32  # at a time


class Ending(NamedTuple):
    """Where a text ends, beside the model's own stop tokens.

    Attributes:
        until: strings; what comes from the first of them on is left out.
        max_tokens: of the text.
    """

    until: tuple[str, ...]
    max_tokens: int


class Sampling(NamedTuple):
    """How tokens are drawn; as in `generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class Continuations:
    """Has a model go on with prompts.

    Args:
        mesh: the devices.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._shards = row_shards(mesh)

    def of(
        self, model: Model, tokenizer: Tokenizer, prompts: Sequence[Tokens], ending: Ending, sampling: Sampling
    ) -> list[str]:
        """What follows each prompt, without control tokens.

        Args:
            model: on the mesh.
            tokenizer: the model's.
            prompts: token ids.
            ending: of each text.
            sampling: how tokens are drawn.
        """
        stops, control = set(tokenizer.stop_ids), {*tokenizer.stop_ids, *tokenizer.special_tokens}
        new: list[list[int]] = [[] for _ in prompts]

        def text(i: int) -> str:
            return tokenizer.decode(token for token in new[i] if token not in control)

        def ended(i: int) -> bool:
            whole = text(i)
            return len(new[i]) == ending.max_tokens or new[i][-1] in stops or _cut(whole, ending.until) != whole

        unfinished, size = list(range(len(prompts))), _FIRST_TOKENS
        with jax.set_mesh(self._mesh):
            # What is not finished is read again, in one pass, which costs little beside token after token.
            while unfinished:
                size = min(size, ending.max_tokens - len(new[unfinished[0]]))
                unfinished.sort(key=lambda i: len(prompts[i]), reverse=True)
                rows = self._shards * -(-min(_ROWS, len(unfinished)) // self._shards)
                for start in range(0, len(unfinished), rows):
                    chosen = unfinished[start : start + rows]
                    self._extend(
                        model, tokenizer, {i: [*prompts[i], *new[i]] for i in chosen}, new, rows, size, sampling
                    )
                unfinished, size = [i for i in unfinished if not ended(i)], 2 * size
        return [_cut(text(i), ending.until) for i in range(len(prompts))]

    def _extend(self, model, tokenizer, texts, new, rows, size, sampling) -> None:
        """Adds `size` tokens, or those up to a stop token, to the `new` ones of some texts."""
        # A batch that is not full has its last text again.
        numbers = [*texts, *[next(reversed(texts))] * (rows - len(texts))]
        lengths = np.array([len(texts[i]) for i in numbers])
        padded = np.zeros((rows, bucket(int(lengths.max()))), np.int32)
        for row, i in zip(padded, numbers, strict=True):
            row[: len(texts[i])] = texts[i]
        made = generate(
            model,
            padded,
            lengths,
            max_new_tokens=size,
            seeds_B=np.array([(i + 1_000_003 * len(new[i])) % 2**32 for i in numbers]),
            stop_tokens=np.array(tokenizer.stop_ids),
            **sampling._asdict(),
        )
        tokens, lengths = jax.device_get((made.tokens, made.lengths))
        for i, row, length in zip(texts, tokens, lengths, strict=False):
            new[i] += row[:length].tolist()


def _cut(text: str, until: Sequence[str]) -> str:
    """What comes before the first of some strings."""
    for string in until:
        text = text.split(string, 1)[0]
    return text
