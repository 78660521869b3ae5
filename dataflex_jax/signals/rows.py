"""What the signals that differentiate share: a row's loss, and parameters by path."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.models.lora import FACTORS

PyTree = Any
Select = Callable[[str], bool]
ExampleLoss = Callable[[Float[Array, " T"], dict[str, Array]], Float[Array, ""]]

LAYERS = "layers/"
_ARRAYS = ("tokens", "mask", "token_weights")


def row_loss(token_losses: Float[Array, " T"], row: dict[str, Array]) -> Float[Array, ""]:
    """The mean over the row's targets, 0 without any; the weighted sum where the row has token_weights."""
    if "token_weights" in row:
        return jnp.sum(row["token_weights"] * token_losses)
    return jnp.sum(row["mask"] * token_losses) / jnp.maximum(jnp.sum(row["mask"]), 1.0)


def row_arrays(batch: dict[str, Array], example_loss: ExampleLoss | None = None) -> dict[str, Array]:
    """The arrays that a row's loss reads: all of them where it is the caller's own."""
    return dict(batch) if example_loss is not None else {name: batch[name] for name in _ARRAYS if name in batch}


def selected_paths(params: PyTree, select: Select | None = None) -> tuple[str, ...]:
    """The paths of the parameters that `select` accepts, in the order of the leaves.

    Args:
        params: the trained parameters.
        select: None: the adapters where there are any, else the kernels of the blocks' linear layers.

    Raises:
        ValueError: there are none.
    """
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if select is None:
        factors = tuple(path for path in paths if path.endswith(FACTORS))
        return factors or tuple(path for path in paths if path.startswith(LAYERS) and path.endswith("/kernel"))
    chosen = tuple(path for path in paths if select(path))
    if not chosen:
        raise ValueError(f"parameters: select none of the trained ones, such as {paths[0]}; must select at least one")
    return chosen


def map_named(fn: Callable[[str, Array], Array], tree: PyTree) -> PyTree:
    """`fn` of every leaf's "/"-joined path and the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_name(path), leaf), tree)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
