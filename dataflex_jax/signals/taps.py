"""What becomes of one example's gradient where it appears in the backward pass, so that no [B, P] is ever kept.

Keeping B gradients is what makes them expensive, not computing them. So each parameter meets a `tap` [width] of zeros
in an identity whose backward pass turns the parameter's gradient (one example's, under `jax.vmap`) into its image, a
few numbers, hands that back as the tap's gradient and drops the rest. The scan over layers sums the taps: `vmap(grad)`
with respect to the tap is [B, width], and one layer's per-example gradients are alive at a time.

A parameter outside the layers that is used twice (a table that is the head too) has one tap, which sees the sum.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.data.batch import Batch
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.layout import LAYERS, gather_weights
from dataflex_jax.models.model import Model
from dataflex_jax.signals.moments import Moments, preconditioned
from dataflex_jax.signals.rows import ExampleLoss, alone, map_named, named_leaves, tile_tokens

# (path, layer, gradient of that layer, directions [G, ...] like it or None) -> its image
Image = Callable[..., Float[Array, " width"]]


def tapped(
    model: Model,
    paths: tuple[str, ...],
    image: Image,
    width: int,
    loss: ExampleLoss,
    rows: Batch,
    *,
    moments: Moments | None = None,
    directions: Mapping[str, Float[Array, "G ..."]] | None = None,
) -> Float[Array, "B width"]:
    """The images of each row's gradient, summed over the parameters and layers; float32.

    Args:
        model: whose gradients.
        paths: of the parameters.
        image: of (path, layer, gradient, directions) to `width` numbers.
        width: numbers of an image.
        loss: of a row.
        rows: the batch's.
        moments: precondition each row's gradient by them first.
        directions: by path, whole; the image gets the layer's slice, gathered.
    """
    of_parameter = {} if moments is None else moments_by_path(moments, paths)
    hooks = Hooks(
        tile_tokens=tile_tokens(rows.num_rows),
        # Outside are the head and a table that may be tied to it.
        frozen_head=all(path.startswith(LAYERS) for path in paths),
    )

    def through(path, weight, layer, tap):
        if path not in paths:
            return weight
        beside = None if directions is None else directions[path]
        return _tap(partial(image, path), path, weight, tap, layer, of_parameter.get(path), beside)

    def of_row(tap, row):
        def transform(weights, layer):
            return map_named(lambda path, weight: through(f"{LAYERS}{path}", weight, layer, tap), weights)

        def outside(path, weight):
            return weight if path.startswith(LAYERS) else through(path, weight, jnp.int32(0), tap)

        whole = model.having(map_named(outside, model.whole()))
        decoded = whole.token_losses(alone(row), hooks._replace(block_transform=transform))
        return loss(decoded.losses[0], row)

    tap = jnp.zeros(width, jnp.float32)
    return jax.vmap(jax.grad(of_row), in_axes=(None, 0))(tap, rows)


def moments_by_path(moments: Moments, paths: tuple[str, ...]) -> dict[str, Moments]:
    """The moments of each parameter.

    Raises:
        ValueError: they are of other parameters.
    """
    mu, nu = (named_leaves(tree) for tree in (moments.mu, moments.nu))
    if missing := sorted(set(paths) - (mu.keys() & nu.keys())):
        raise ValueError(f"moments: has none of {missing[0]}; must be those of the trained parameters")
    return {path: dataclasses.replace(moments, mu=mu[path], nu=nu[path]) for path in paths}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(
    image: Callable[..., Float[Array, " width"]],
    path: str,
    weight: Float[Array, "..."],
    tap: Float[Array, " width"],
    layer: Int[Array, ""],
    moments: Moments | None,
    directions: Float[Array, "G ..."] | None,
) -> Float[Array, "..."]:
    """The weight; `tap` has the image of its gradient as gradient, the weight itself none."""
    return weight


def _tap_fwd(image, path, weight, tap, layer, moments, directions):
    # Those of all layers: a slice would be kept for each layer where nothing is recomputed.
    return weight, (layer, moments, directions)


def _tap_bwd(image, path, residuals, gradient):
    layer, moments, directions = residuals
    if moments is not None:
        here = [_of_layer(path, leaf, layer) for leaf in (moments.mu, moments.nu)]
        gradient = preconditioned(dataclasses.replace(moments, mu=here[0], nu=here[1]), gradient)
    if directions is not None:
        directions = jax.vmap(lambda leaf: _of_layer(path, leaf, layer))(directions)
    return None, image(layer, gradient, directions), None, None, None


_tap.defvjp(_tap_fwd, _tap_bwd)


def _of_layer(path, leaf, layer):
    """One layer of what is like the parameter, as the per-example gradients need it: gathered over "fsdp"."""
    if not path.startswith(LAYERS):
        return leaf
    tree = leaf[layer]
    for name in reversed(path.removeprefix(LAYERS).split("/")):
        tree = {name: tree}
    return jax.tree.leaves(gather_weights(tree, jnp.float32, LAYERS.rstrip("/")))[0]
