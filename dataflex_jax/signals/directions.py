"""Gradients of examples beside a few directions, exact and without any map, and sums of gradients to make them of.

A direction is like the trained parameters. A set of G is a dict by parameter path of float32 [G, ...], split like the
parameters. A row's influence along a direction D is <g, D> / |g|, for which G + 1 numbers of each row are taken where
its gradient appears: its inner products with D's slice of that layer, and its squared norm.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.layout import LAYERS, param_shardings
from dataflex_jax.models.model import Model
from dataflex_jax.sharding import shardings
from dataflex_jax.signals.moments import Moments
from dataflex_jax.signals.rows import SQUARED_AS, map_named, named_leaves, row_loss
from dataflex_jax.signals.taps import tapped

Directions = Mapping[str, Float[Array, "G ..."]]


class Beside(NamedTuple):
    """Each row's gradient beside G directions.

    Attributes:
        influences: <g, D> / |g|, [B, G]; NaN where g is zero or not finite.
        norms: |g|, [B].
    """

    influences: Float[Array, "B G"]
    norms: Float[Array, " B"]


def beside(
    model: Model,
    batch: Batch,
    paths: tuple[str, ...],
    directions: Directions | None = None,
    moments: Moments | None = None,
) -> Beside:
    """The rows' gradients of their token-mean losses beside directions, float32.

    Args:
        model: whose gradients.
        batch: of rows.
        paths: of the parameters.
        directions: of these parameters at least; None: the norms alone are wanted.
        moments: precondition each row's gradient by them first.
    """
    count = 0 if directions is None else directions[paths[0]].shape[0]
    rows = batch.rows_alone()
    found = tapped(model, paths, _image, count + 1, row_loss, rows, moments=moments, directions=directions)
    norms = jnp.sqrt(found[:, count])
    divisor = jnp.where((norms > 0) & jnp.isfinite(norms), norms, jnp.nan)
    return Beside(found[:, :count] / divisor[:, None], norms / SQUARED_AS)


def _image(path, layer, gradient, directions):
    """(<g, D_1>, ..., <g, D_G>, |g|^2) of the scaled gradient."""
    scaled = SQUARED_AS * gradient.astype(jnp.float32)
    square = _inner(scaled, scaled)[None]
    if directions is None:
        return square
    axes = tuple(range(scaled.ndim))
    along = jnp.tensordot(directions, scaled, (tuple(axis + 1 for axis in axes), axes), precision="highest")
    return jnp.concatenate([along, square])


def _inner(x, y):
    """<x, y>; row by row first, because a running sum of millions of numbers loses digits."""
    return jnp.sum(jnp.einsum("...i,...i->...", x, y, precision="highest"))


def abstract_directions(mesh: Mesh, params: PyTree, paths: tuple[str, ...], count: int) -> Directions:
    """Shapes and shardings of `count` directions of these parameters, each split like its parameter."""
    leaves, split = named_leaves(params), named_leaves(param_shardings(mesh, params))
    return {
        path: jax.ShapeDtypeStruct(
            (count, *leaves[path].shape), jnp.float32, sharding=NamedSharding(mesh, P(None, *split[path].spec))
        )
        for path in leaves
        if path in paths
    }


def no_directions(mesh: Mesh, params: PyTree, paths: tuple[str, ...], count: int) -> Directions:
    """`count` directions of zeros for these parameters, each split like its parameter."""
    abstract = abstract_directions(mesh, params, paths, count)
    zeros = {path: functools.partial(jnp.zeros, leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    return jax.jit(lambda: {path: make() for path, make in zeros.items()}, out_shardings=shardings(abstract))()


def direction_bytes(mesh: Mesh, params: PyTree, paths: tuple[str, ...]) -> int:
    """Bytes of a device that one direction takes: its part, and the slice that is gathered while it is used."""
    leaves, split = named_leaves(params), named_leaves(param_shardings(mesh, params))
    parts = sum(_numbers(split[path].shard_shape(leaves[path].shape)) for path in paths)
    slices = (leaves[path].shape[path.startswith(LAYERS) :] for path in paths)
    return 4 * (parts + max(map(_numbers, slices)))


def _numbers(shape: tuple[int, ...]) -> int:
    return functools.reduce(int.__mul__, shape, 1)


def add_gradient(
    directions: Directions, number: Int[Array, ""], model: Model, batch: Batch, weights: Float[Array, " B"]
) -> Directions:
    """The directions after the sum of weight times gradient of the rows was added to one of them.

    One backward pass for the whole batch. A row of weight 0 is only harmless where its loss is finite.

    Args:
        directions: of the parameters that are wanted.
        number: of the one to add to.
        model: whose gradients.
        batch: of rows.
        weights: of the rows.
    """
    rows = batch.rows_alone()
    chosen = {path: leaf for path, leaf in named_leaves(model.params).items() if path in directions}
    hooks = Hooks(frozen_head=all(path.startswith(LAYERS) for path in directions))

    def weighted_loss(chosen):
        whole = model.having(map_named(lambda path, leaf: chosen.get(path, leaf), model.whole()))
        return jnp.sum(weights * jax.vmap(row_loss)(whole.token_losses(rows, hooks).losses, rows))

    gradient = jax.grad(weighted_loss)(chosen)
    return {path: leaf.at[number].add(gradient[path].astype(jnp.float32)) for path, leaf in directions.items()}
