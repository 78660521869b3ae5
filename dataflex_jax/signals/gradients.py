"""Per-example gradients, projected where they appear in the backward pass.

Keeping B gradients is what makes them expensive, not computing them. So each parameter meets a `tap` [dim] of zeros in
an identity whose backward pass turns the parameter's gradient (one example's, under `jax.vmap`) into its Adam-
preconditioned projection, hands that back as the tap's gradient and drops the rest. The scan over layers sums the taps:
`vmap(grad)` with respect to the tap is [B, dim], and one layer's per-example gradients are alive at a time.

B rows, T tokens a row. A batch is a dict of tokens int32 [B, T+1] and mask float32 [B, T] (rows padded on the right),
or token_weights float32 [B, T] in place of the mask. The loss of a row is sum(mask * l) / sum(mask), or
sum(token_weights * l), of its token losses l, without dropout. All functions here are pure; jit them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dataflex_jax.models import decoder, lora
from dataflex_jax.models.layout import LAYERS, gather_weights
from dataflex_jax.signals import products
from dataflex_jax.signals.moments import Moments, adam_moments, preconditioned
from dataflex_jax.signals.projections import METHODS, Projection, check, project
from dataflex_jax.signals.rows import (
    ExampleLoss,
    Select,
    map_named,
    named_leaves,
    row_arrays,
    row_loss,
    selected_paths,
    tile_tokens,
)

__all__ = [
    "METHODS",
    "Moments",
    "Projection",
    "adam_moments",
    "directional_derivatives",
    "gradient_features",
    "gradient_norms",
]

PyTree = Any
Batch = dict[str, Array]


def gradient_features(
    graphdef: nnx.GraphDef,
    projection: Projection,
    *,
    parameters: Select | None = None,
    example_loss: ExampleLoss | None = None,
) -> Callable[..., Float[Array, "B dim"]]:
    """The function that computes the rows' projected gradients.

    Args:
        graphdef: the model's static part.
        projection: the map. "none" keeps every number, in the order of the parameters' leaves.
        parameters: which trained parameters, by path such as "layers/mlp/up_proj/kernel". None: the adapters where
            there are any, else the kernels of the blocks' linear layers. What is outside the layers has its
            per-example gradients in memory whole.
        example_loss: of (token losses float32 [T], a dict of the row's arrays) in place of the module's.

    Returns:
        features(params, frozen, batch, moments=None): float32 [B, dim]. `params` are those that are trained and
        `frozen` the others or None, as in `TrainState`; with `moments` (like `params`) it is each example's
        preconditioned gradient that is projected. A row without targets has the gradient 0.

    Raises:
        ValueError: an impossible projection; when the function is called, parameters or moments it cannot serve.
    """
    check(projection)
    loss = example_loss or row_loss
    if projection.method == "kronecker":
        return partial(_kronecker, graphdef, projection, parameters, loss)
    of_rows = _every_number if projection.method == "none" else _projected

    def features(params: PyTree, frozen: PyTree | None, batch: Batch, moments: Moments | None = None):
        paths = selected_paths(params, parameters)
        return of_rows(graphdef, projection, paths, loss, params, frozen, row_arrays(batch, example_loss), moments)

    return features


def gradient_norms(
    graphdef: nnx.GraphDef, *, parameters: Select | None = None
) -> Callable[[PyTree, PyTree | None, Batch], Float[Array, " B"]]:
    """The function of (params, frozen, batch) that computes the norms of the rows' gradients, float32 [B].

    Exact, from the inputs and output gradients of the linear layers; no weight's gradient is formed
    (`products.squared_norms`).

    Args:
        graphdef: the model's static part.
        parameters: as in `gradient_features`, among the kernels and adapters of the blocks' linear layers.
    """

    def norms(params: PyTree, frozen: PyTree | None, batch: Batch) -> Float[Array, " B"]:
        paths = selected_paths(params, parameters)
        squares = products.squared_norms(graphdef, paths, row_loss, params, frozen, row_arrays(batch))
        return jnp.sqrt(squares)

    return norms


def directional_derivatives(
    graphdef: nnx.GraphDef,
) -> Callable[[PyTree, PyTree | None, Batch, PyTree], Float[Array, " B"]]:
    """The function of (params, frozen, batch, direction) that computes <g_b, direction> of every row, float32 [B].

    `direction` is like params. The model's own derivatives are reverse ones, so this is the transpose of the gradient
    as a function of the rows' weights: no per-example gradient is formed, and the cost does not depend on B but for B
    forward and backward passes.
    """

    def derivatives(params: PyTree, frozen: PyTree | None, batch: Batch, direction: PyTree) -> Float[Array, " B"]:
        rows = row_arrays(batch)

        def losses(params):
            token_losses, _ = decoder.token_losses(graphdef, lora.combine(frozen, params), rows["tokens"])
            return jax.vmap(row_loss)(token_losses, rows)

        values, gradient = jax.vjp(losses, params)
        _, transposed = jax.vjp(lambda weights: gradient(weights)[0], jnp.zeros_like(values))
        return transposed(direction)[0]

    return derivatives


def _kronecker(graphdef, projection, parameters, loss, params, frozen, batch, moments=None):
    if moments is not None:
        raise ValueError(
            "moments: the projection 'kronecker' never forms the gradient that Adam would precondition; "
            "must be None (gradient_type='sgd'), or the method one of 'sketch', 'rademacher', 'none'"
        )
    paths = selected_paths(params, parameters)
    rows = row_arrays(batch, None if loss is row_loss else loss)
    return products.kronecker_features(graphdef, projection, paths, loss, params, frozen, rows)


def _projected(graphdef, projection, paths, loss, params, frozen, rows, moments):
    of_parameter = {} if moments is None else _by_path(moments, paths)

    # Outside are the head and a table that may be tied to it.
    frozen_head = all(path.startswith(LAYERS) for path in paths)

    def tapped(path, weight, layer, tap):
        if path not in paths:
            return weight
        return _tap(partial(project, projection, path), path, weight, tap, layer, of_parameter.get(path))

    def of_row(tap, row):
        def transform(weights, layer):
            return map_named(lambda path, weight: tapped(f"{LAYERS}{path}", weight, layer, tap), weights)

        def outside(path, weight):
            return weight if path.startswith(LAYERS) else tapped(path, weight, jnp.int32(0), tap)

        model = map_named(outside, lora.combine(frozen, params))
        losses, _ = decoder.token_losses(
            graphdef,
            model,
            row["tokens"][None],
            block_transform=transform,
            tile_tokens=tile_tokens(rows["tokens"].shape[0]),
            frozen_head=frozen_head,
        )
        return loss(losses[0], row)

    tap = jnp.zeros(projection.dim, jnp.float32)
    return jax.vmap(jax.grad(of_row), in_axes=(None, 0))(tap, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(
    image: Callable[[Int[Array, ""], Float[Array, "..."]], Float[Array, " dim"]],
    path: str,
    weight: Float[Array, "..."],
    tap: Float[Array, " dim"],
    layer: Int[Array, ""],
    moments: Moments | None,
) -> Float[Array, "..."]:
    """The weight; `tap` has the image of its gradient as gradient, the weight itself none."""
    return weight


def _tap_fwd(image, path, weight, tap, layer, moments):
    # The moments of all layers: a slice would be kept for each layer where nothing is recomputed.
    return weight, (layer, moments)


def _tap_bwd(image, path, residuals, gradient):
    layer, moments = residuals
    if moments is not None:
        here = [_of_layer(path, leaf, layer) for leaf in (moments.mu, moments.nu)]
        gradient = preconditioned(dataclasses.replace(moments, mu=here[0], nu=here[1]), gradient)
    return None, image(layer, gradient), None, None


_tap.defvjp(_tap_fwd, _tap_bwd)


def _of_layer(path, leaf, layer):
    """The moments of one layer as the per-example gradients need them: gathered over "fsdp"."""
    if not path.startswith(LAYERS):
        return leaf
    tree = leaf[layer]
    for name in reversed(path.removeprefix(LAYERS).split("/")):
        tree = {name: tree}
    return jax.tree.leaves(gather_weights(tree, jnp.float32, LAYERS.rstrip("/")))[0]


def _by_path(moments, paths):
    mu, nu = (named_leaves(tree) for tree in (moments.mu, moments.nu))
    if missing := sorted(set(paths) - (mu.keys() & nu.keys())):
        raise ValueError(f"moments: has none of {missing[0]}; must be those of the trained parameters")
    return {path: dataclasses.replace(moments, mu=mu[path], nu=nu[path]) for path in paths}


def _every_number(graphdef, projection, paths, loss, params, frozen, rows, moments):
    chosen = {path: leaf for path, leaf in named_leaves(params).items() if path in paths}
    of_parameter = {} if moments is None else _by_path(moments, paths)

    def of_row(chosen, row):
        model = map_named(lambda path, leaf: chosen.get(path, leaf), lora.combine(frozen, params))
        losses, _ = decoder.token_losses(
            graphdef, model, row["tokens"][None], tile_tokens=tile_tokens(rows["tokens"].shape[0])
        )
        return loss(losses[0], row)

    def flat(row):
        gradients = jax.grad(of_row)(chosen, row)
        if moments is not None:
            gradients = {path: preconditioned(of_parameter[path], gradient) for path, gradient in gradients.items()}
        return jnp.concatenate([gradients[path].astype(jnp.float32).ravel() for path in chosen])

    return jax.vmap(flat)(rows)
