"""What the signals that differentiate share: a row's loss, and parameters by path."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.models import layout
from dataflex_jax.models.loss import TILE_TOKENS
from dataflex_jax.sharding import BATCH_AXES, leaf_name

Select = Callable[[str], bool]
# (token losses, the row) -> its loss
ExampleLoss = Callable[[Float[Array, " T"], Batch], Float[Array, ""]]
# Gradients are multiplied by this before they are squared: norms from 1e-25 to 1e12 then keep float32's digits.
SQUARED_AS = 2.0**24


def row_loss(token_losses: Float[Array, " T"], row: Batch) -> Float[Array, ""]:
    """The mean over the row's targets, 0 without any."""
    return jnp.sum(row.mask * token_losses) / jnp.maximum(jnp.sum(row.mask), 1.0)


def alone(row: Batch) -> Batch:
    """A row under `jax.vmap` as a batch of one."""
    return jax.tree.map(lambda leaf: leaf[None], row)


def selected_paths(params: PyTree, select: Select | None = None) -> tuple[str, ...]:
    """The paths of the parameters that `select` accepts, in the order of the leaves.

    Args:
        params: the trained parameters.
        select: None: the adapters where there are any, else the kernels of the blocks' linear layers, those of experts
            too, else all.

    Raises:
        ValueError: there are none.
    """
    paths = list(named_leaves(params))
    if select is None:
        linear = [path for path in paths if layout.in_blocks(path)]
        return tuple(path for path in linear if layout.row(path).factor) or tuple(linear or paths)
    chosen = tuple(path for path in paths if select(path))
    if not chosen:
        raise ValueError(f"parameters: select none of the trained ones, such as {paths[0]}; must select at least one")
    return chosen


def select_of(parameters: str) -> Select | None:
    """What selects the parameters that a signal names: "blocks", see `selected_paths`, or "all" that are trained."""
    return None if parameters == "blocks" else lambda path: True


def tile_tokens(rows: int) -> int:
    """The loss's tile for each of `rows` examples under `jax.vmap`: a device has as many logits as in training."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)
    return max(1, TILE_TOKENS // math.ceil(rows / devices))


def named_leaves(tree: PyTree) -> dict[str, Array]:
    """The leaves by "/"-joined path, in their order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(fn: Callable[[str, Array], Array], tree: PyTree) -> PyTree:
    """`fn` of every leaf's "/"-joined path and the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(leaf_name(path), leaf), tree)
