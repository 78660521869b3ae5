"""Responses that a model gives to the prompts of rows, and what of a row its prompt is.

A row's last response is its last run of predictions that count in the loss; its prompt is everything before. Sampling
is a sweep like any other: in length buckets, sharded, the same in every batch and on every mesh, and started anew from
its seeds where it was interrupted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray, PyTree, UInt32

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.listed import ListedRows
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import Row
from dataflex_jax.errors import InputError
from dataflex_jax.models.generation.generate import Codec, generate
from dataflex_jax.policies.signals import Exchange, Generations, Task


class Question(NamedTuple):
    """A row as something to be answered.

    Attributes:
        task: in words.
        prompt: its tokens.
    """

    task: Task
    prompt: Int32[np.ndarray, " p"]


def questions(pool: Pool, ids: Sequence[int], codec: Codec) -> list[Question]:
    """The rows as questions.

    Raises:
        InputError: one that has no response, or nothing before it; names it.
    """
    found = []
    for place, i in enumerate(ids):
        prompt, response = _parts(pool, int(i))
        reference = codec.decode(_spoken(response, codec))
        found.append(Question(Task(place, pool.where(int(i)), codec.decode(prompt), reference), prompt))
    return found


def _parts(pool: Pool, i: int) -> tuple[Int32[np.ndarray, " p"], Int32[np.ndarray, " r"]]:
    """The tokens before a row's last response, and those of it."""
    row = pool.row(i)
    counting = np.flatnonzero(row.mask)
    if not len(counting):
        raise InputError(f"the target {pool.where(i)} has no response: none of its tokens counts in the loss")
    last = int(counting[-1])
    # The first place after which all up to the last count.
    first = last + 1 - int(np.argmin(np.append(row.mask[: last + 1][::-1], False)))
    if first == 0:
        raise InputError(
            f"the target {pool.where(i)} has no prompt: all of its tokens count in the loss; responses are sampled for "
            "instruction data whose prompts do not (config.data.train_on_prompt=False)"
        )
    return row.tokens[: first + 1], row.tokens[first + 1 : last + 2]


def _spoken(tokens: Int32[np.ndarray, " n"], codec: Codec) -> Int32[np.ndarray, " m"]:
    """What comes before the first stop token."""
    stops = np.flatnonzero(np.isin(tokens, codec.stop_ids))
    return tokens[: stops[0]] if len(stops) else tokens


def seeds(key: PRNGKeyArray, rows: int, samples: int) -> UInt32[np.ndarray, "n S"]:
    """A seed for each sample of each row, the same however many there are of either."""

    def one(row: Int[Array, ""], sample: Int[Array, ""]) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, row), sample), dtype=jnp.uint32)

    of_row = jax.vmap(one, in_axes=(None, 0))
    return np.asarray(jax.vmap(of_row, in_axes=(0, None))(jnp.arange(rows), jnp.arange(samples)))


# The same object for equal values, because a sweep is compiled once for each function.
@functools.cache
def sampler(generations: Generations) -> Callable[[PyTree, tuple[Batch, Array]], tuple[Array, Array]]:
    """The function of ((model, stop tokens), (batch, (prompt length, seed) of each row)) that samples a response.

    It gives its tokens [B, N] and how many they are [B].
    """

    def of_rows(operands: PyTree, rows: tuple[Batch, UInt32[Array, "B 2"]]) -> tuple[Array, Array]:
        (model, stop_tokens), (batch, numbers) = operands, rows
        # Padding does what the first row does, which ends when that row does.
        real = batch.lengths[:, None] > 0
        tokens, numbers = (jnp.where(real, each, each[:1]) for each in (batch.tokens, numbers))
        made = generate(
            model,
            tokens,
            numbers[:, 0].astype(jnp.int32),
            max_new_tokens=generations.max_new_tokens,
            seeds_B=numbers[:, 1],
            temperature=generations.temperature,
            top_k=generations.top_k,
            top_p=generations.top_p,
            stop_tokens=stop_tokens,
        )
        return made.tokens, made.lengths

    return of_rows


def answered(
    asked: Sequence[Question], tokens: Int[np.ndarray, "n N"], lengths: Int[np.ndarray, " n"], codec: Codec
) -> tuple[list[Exchange], ListedRows]:
    """What was said, in words and as rows of prompt and response whose loss is on the response.

    Args:
        asked: the question of each response.
        tokens: of the responses.
        lengths: how many of them each has.
        codec: tokens to text.
    """
    exchanges, rows = [], []
    for (task, prompt), response, length in zip(asked, tokens, lengths.tolist(), strict=True):
        said = response[:length].astype(np.int32)
        whole = np.concatenate([prompt, said])
        exchanges.append(Exchange(task, codec.decode(_spoken(said, codec)), codec.decode(whole)))
        rows.append(Row(whole, np.arange(1, len(whole)) >= len(prompt)))
    return exchanges, ListedRows(rows)
