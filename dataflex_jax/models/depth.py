"""How the blocks follow each other: scanned, as one program for all of them, or written out one after the other.

Written out, what the backward pass needs of a block stays where the block left it. A scan writes it into arrays of all
layers and reads it back from them, up to a fifth of a step's traffic; but its program is compiled several times faster.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from dataflex_jax.models.layout import cast_weights
from dataflex_jax.models.remat import Policy

# (what goes from block to block, (index, the block's parameters)) -> (the same, what the block says beside it).
Block = Callable[[PyTree, tuple[Array, PyTree]], tuple[PyTree, PyTree]]


def scanned(block: Block, carry: PyTree, layers: PyTree, policy: Policy) -> tuple[PyTree, PyTree]:
    """The last carry, and what the blocks said, stacked.

    Args:
        block: one of them.
        carry: for the first.
        layers: the parameters of all, with a leading axis.
        policy: what the backward pass keeps of a block.
    """
    # The scan already keeps the recomputation apart, so the barriers against merging it away would only cost.
    block = jax.checkpoint(block, policy=policy, prevent_cse=False)
    return jax.lax.scan(block, carry, (jnp.arange(_depth(layers)), layers))


def written_out(
    block: Block, carry: PyTree, layers: PyTree, head: Array, policy: Policy, dtype: jnp.dtype, *, mlp: str | None
) -> tuple[PyTree, PyTree, Array]:
    """As `scanned`, and the output head's weight.

    Args:
        block: as there; the carry's first part are the hidden states.
        carry: as there.
        layers: as there.
        head: the output head's weight; the one that is returned is to be used.
        policy: as there.
        dtype: the compute dtype, to which weights are cast once for both passes.
        mlp: the blocks' MLP, by its name among the parameters, where all parameters have gradients: their products,
            and the exchange of the head's, are not put off then. None: some have none, and must not get one from here.
    """
    block = jax.checkpoint(block, policy=policy)
    # Cast beforehand, they are cast once for both passes.
    weights = [
        cast_weights(jax.tree.map(lambda leaf, n=n: leaf[n], layers), dtype, "layers") for n in range(_depth(layers))
    ]
    said = []
    for n in range(len(weights)):
        if mlp is not None:
            carry = _in_turn(carry, weights, n, mlp)
            if n == len(weights) - 1:
                # Put off to the end, when only the embedding's gradient waits for it, nothing would hide the exchange.
                carry, head = _waits(carry, head)
        carry, aux = block(carry, (jnp.int32(n), weights[n]))
        said.append(aux)
    return carry, stacked(said), head


def stacked(said: Sequence[PyTree]) -> PyTree:
    """What the blocks said beside their outputs, as one tree."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *said)


def _depth(layers: PyTree) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _in_turn(carry: PyTree, weights: list[dict[str, PyTree]], n: int, mlp: str) -> PyTree:
    """The carry for block n, whose backward pass ends when the gradients of its MLP and of the attention after it are
    there; replaces those weights.

    XLA would put products off that only the optimizer waits for, and keep their operands, which are much larger. They
    have the time of half a block to be summed over the devices.
    """
    after = weights[n + 1] if n + 1 < len(weights) else {}
    due = weights[n][mlp], {name: part for name, part in after.items() if name != mlp}
    carry, (weights[n][mlp], rest) = _waits(carry, due)
    after |= rest
    return carry


def _waits(carry: PyTree, weights: PyTree) -> tuple[PyTree, PyTree]:
    """Both as they are; in the backward pass neither gradient, of weights or hidden states, goes on before the other is
    there."""
    hidden, *others = carry
    hidden, weights = _together(hidden, weights)
    return (hidden, *others), weights


@jax.custom_vjp
def _together(hidden, weights):
    return hidden, weights


def _together_bwd(_, gradients):
    return jax.lax.optimization_barrier(gradients)


_together.defvjp(lambda hidden, weights: ((hidden, weights), None), _together_bwd)
