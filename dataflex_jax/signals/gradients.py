"""Per-example gradients, projected where they appear in the backward pass.

The loss of a row is sum(mask * l) / sum(mask) of its token losses l, without dropout; rows are padded on the right. All
functions here are pure; jit them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.models import layout
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.signals import products
from dataflex_jax.signals.directions import beside
from dataflex_jax.signals.moments import Moments, preconditioned
from dataflex_jax.signals.projections import check, project
from dataflex_jax.signals.rows import (
    ExampleLoss,
    Select,
    alone,
    map_named,
    named_leaves,
    row_loss,
    selected_paths,
    tile_tokens,
)
from dataflex_jax.signals.taps import moments_by_path, tapped


def gradient_features(
    projection: Projection, *, parameters: Select | None = None, example_loss: ExampleLoss | None = None
) -> Callable[..., Float[Array, "B dim"]]:
    """The function that computes the rows' projected gradients.

    Args:
        projection: the map. "none" keeps every number, in the order of the parameters' leaves.
        parameters: which trained parameters, by path such as "layers/mlp/up_proj/kernel". None: the adapters where
            there are any, else the kernels of the blocks' linear layers. What is outside the layers has its
            per-example gradients in memory whole.
        example_loss: of (token losses float32 [T], the row's part of the batch) in place of the module's.

    Returns:
        features(model, batch, moments=None): float32 [B, dim]; with `moments` (like model.params) it is each example's
        preconditioned gradient that is projected. A row without targets has the gradient 0.

    Raises:
        ValueError: an impossible projection; when the function is called, parameters or moments it cannot serve.
    """
    check(projection)
    of_rows = {"kronecker": _kronecker, "none": _every_number}.get(projection.method, _projected)

    def features(model: Model, batch: Batch, moments: Moments | None = None) -> Float[Array, "B dim"]:
        paths = selected_paths(model.params, parameters)
        return of_rows(model, projection, paths, example_loss or row_loss, batch.rows_alone(), moments)

    return features


def gradient_norms(*, parameters: Select | None = None) -> Callable[[Model, Batch], Float[Array, " B"]]:
    """The function of (model, batch) that computes the norms of the rows' gradients, float32 [B].

    Exact. Of the kernels and adapters of the blocks' linear layers no gradient is formed (`products.norms`);
    with other parameters among them, each row's is, where it appears.

    Args:
        parameters: as in `gradient_features`.
    """

    def norms(model: Model, batch: Batch) -> Float[Array, " B"]:
        paths = selected_paths(model.params, parameters)
        if all(map(layout.is_linear, paths)):
            return products.norms(model, paths, row_loss, batch.rows_alone())
        return beside(model, batch, paths).norms

    return norms


def directional_derivatives(model: Model, batch: Batch, directions: PyTree) -> Float[Array, "B G"]:
    """<g_b, direction> of every row and each of G directions, float32, in one pass.

    The products are taken where a row's gradient appears, layer by layer. What is outside the layers has its
    per-example gradients in memory whole. The transpose of the gradient as a function of the rows' weights would form
    none, but is a derivative of the attention's backward pass, which cuDNN's has not; with XLA's it takes longer.

    Args:
        model: whose gradients.
        batch: of rows.
        directions: like model.params, with a leading axis of G.
    """
    by_path = {path: leaf.astype(jnp.float32) for path, leaf in named_leaves(directions).items()}
    count = next(iter(by_path.values())).shape[0]

    def image(path, layer, gradient, here):
        axes = tuple(range(gradient.ndim))
        beside = tuple(axis + 1 for axis in axes)
        return jnp.tensordot(here, gradient.astype(jnp.float32), (beside, axes), precision="highest")

    return tapped(model, tuple(by_path), image, count, row_loss, batch.rows_alone(), directions=by_path)


def _kronecker(model, projection, paths, loss, rows, moments):
    if moments is not None:
        raise ValueError(
            "moments: the projection 'kronecker' never forms the gradient that Adam would precondition; "
            "must be None (gradient_type='sgd'), or the method one of 'sketch', 'rademacher', 'none'"
        )
    return products.kronecker_features(model, projection, paths, loss, rows)


def _projected(model, projection, paths, loss, rows, moments):
    def image(path, layer, gradient, directions):
        return project(projection, path, layer, gradient)

    return tapped(model, paths, image, projection.dim, loss, rows, moments=moments)


def _every_number(model, projection, paths, loss, rows, moments):
    chosen = {path: leaf for path, leaf in named_leaves(model.params).items() if path in paths}
    of_parameter = {} if moments is None else moments_by_path(moments, paths)
    hooks = Hooks(tile_tokens=tile_tokens(rows.num_rows))

    def of_row(chosen, row):
        whole = model.having(map_named(lambda path, leaf: chosen.get(path, leaf), model.whole()))
        return loss(whole.token_losses(alone(row), hooks).losses[0], row)

    def flat(row):
        gradients = jax.grad(of_row)(chosen, row)
        if moments is not None:
            gradients = {path: preconditioned(of_parameter[path], gradient) for path, gradient in gradients.items()}
        return jnp.concatenate([gradients[path].astype(jnp.float32).ravel() for path in chosen])

    return jax.vmap(flat)(rows)
