"""Domain losses over a whole run in a fixed amount of memory."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LossHistory(NamedTuple):
    """H points a domain, each the mean over a block of consecutive steps.

    When all H points are taken, neighbours are merged, so that H/2 are free, and blocks are twice as long from then on.
    Sums are held, so that a merged point is the exact mean over its steps.

    Attributes:
        loss_sum: float32 [K, H], sum of the rows' losses in a block.
        row_sum: float32 [K, H], number of these rows.
        sample_sum: float32 [K, H], sum over the block's steps of the samples seen until then.
        filled: number of complete blocks, < H.
        steps: steps in the block after these.
        block: steps a block.
    """

    loss_sum: Float[Array, "K H"]
    row_sum: Float[Array, "K H"]
    sample_sum: Float[Array, "K H"]
    filled: Int[Array, ""]
    steps: Int[Array, ""]
    block: Int[Array, ""]

    @classmethod
    def empty(cls, num_domains: int, points: int, block: int) -> Self:
        """A history of `points` (even) points a domain, at first of `block` steps each."""
        zeros = jnp.zeros((num_domains, points), jnp.float32)
        return cls(zeros, zeros, zeros, jnp.int32(0), jnp.int32(0), jnp.int32(block))

    def add(
        self,
        losses: Float[Array, " K"],
        rows: Int[Array, " K"],
        samples: Int[Array, " K"],
        wanted: Bool[Array, ""],
    ) -> Self:
        """The history after one more step.

        Args:
            losses: mean loss of each domain.
            rows: how many rows that is the mean of.
            samples: samples seen until then.
            wanted: whether the step belongs into the history.
        """
        points = self.loss_sum.shape[1]
        here = (jnp.arange(points) == self.filled) & wanted
        sums = (
            self.loss_sum + here * (losses * rows)[:, None],
            self.row_sum + here * rows[:, None],
            self.sample_sum + here * samples[:, None].astype(jnp.float32),
        )
        steps = self.steps + wanted
        complete = steps == self.block
        filled = self.filled + complete
        full = filled == points
        merged = tuple(jnp.where(full, _merged(x), x) for x in sums)
        return LossHistory(
            *merged,
            filled=jnp.where(full, points // 2, filled),
            steps=jnp.where(complete, 0, steps),
            block=jnp.where(full, 2 * self.block, self.block),
        )

    def points(self) -> tuple[Float[Array, "K H"], Float[Array, "K H"], Float[Array, "K H"]]:
        """Mean samples, mean loss and rows of each block; rows are 0 where it is not complete or has no row."""
        rows = self.row_sum * (jnp.arange(self.row_sum.shape[1]) < self.filled)
        return self.sample_sum / self.block, self.loss_sum / jnp.maximum(rows, 1.0), rows


def _merged(sums: Float[Array, "K H"]) -> Float[Array, "K H"]:
    num_domains, points = sums.shape
    pairs = jnp.sum(sums.reshape(num_domains, points // 2, 2), axis=2)
    return jnp.concatenate([pairs, jnp.zeros_like(pairs)], axis=1)
