"""Signals of per-example gradients that never form one: of the linear layers' inputs a_t and output gradients d_t.

The gradient of a matrix is sum_t a_t d_t^T. Both factors are there in the backward pass of the layer's product, so that
is where a summary of them is taken, as the gradient of a `tap` [B, ...] of zeros. Rows do not meet in the model, so the
whole batch runs as in training, without `jax.vmap`.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.data.batch import Batch
from dataflex_jax.errors import InputError
from dataflex_jax.models import layout
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import Projection
from dataflex_jax.sharding import BATCH_AXES, constrain, program_device
from dataflex_jax.signals.projections import kronecker_signs
from dataflex_jax.signals.rows import SQUARED_AS, ExampleLoss

_BLOCK = 2**24  # numbers of a matrix's per-example gradients that are in memory at a time


def check_routed(paths: Iterable[str], option: str | None = None) -> None:
    """Refuses parameters of routed experts, whose gradients are no products of whole rows.

    Args:
        paths: of the parameters.
        option: the one at fault; None: nobody knows which.

    Raises:
        InputError: names the first.
    """
    for path in paths:
        if layout.in_blocks(path) and layout.row(path).routed:
            reason = (
                f"{path} is of routed experts, whose gradients are no products of whole rows, of which a kronecker "
                "projection is made; take another, such as sketch, or leave the experts out of what is trained, by "
                "config.model.trainable or as adapters of the attention do"
            )
            raise InputError(reason, option=option)


def kronecker_features(
    model: Model, projection: Projection, paths: tuple[str, ...], loss: ExampleLoss, rows: Batch
) -> Float[Array, "B dim"]:
    """sum over matrices of P_in^T (sum_t a_t d_t^T) P_out, flattened; every matrix and layer has factors of its own.

    All matrices add to the same `dim` numbers: apart, each would have a share only, and the error would be no smaller.

    Args:
        model: whose gradients.
        projection: `dim` and `seed` of the map.
        paths: of the matrices.
        loss: of a row.
        rows: the batch's.

    Raises:
        ValueError: a path that is not a linear layer's in the blocks.
        InputError: a path of routed experts, each of which sees other tokens.
    """

    def summarize(path, inputs, gradients, layer):
        p_in, p_out = kronecker_signs(projection, path, layer, inputs.shape[-1], gradients.shape[-1])
        image = _matmul("btk,btl->bkl", _matmul("bti,ik->btk", inputs, p_in), _matmul("bto,ol->btl", gradients, p_out))
        image = image.reshape(image.shape[0], -1) / math.sqrt(p_in.shape[1] * p_out.shape[1])
        return jnp.pad(image, ((0, 0), (0, projection.dim - image.shape[1])))

    return _summed(model, paths, summarize, (projection.dim,), loss, rows)[0]


def norms(model: Model, paths: tuple[str, ...], loss: ExampleLoss, rows: Batch) -> Float[Array, " B"]:
    """The root of |sum_t a_t d_t^T|^2 = sum_{s,t} <a_s, a_t> <d_s, d_t>, summed over the matrices (Goodfellow 2015,
    https://arxiv.org/abs/1510.01799; Li et al. 2022, https://arxiv.org/abs/2110.05679, for sequences).

    Args and Raises as in `kronecker_features`.
    """

    def summarize(path, inputs, gradients, layer):
        gradients = SQUARED_AS * gradients
        return jnp.sum(_matmul("bti,bsi->bts", inputs, inputs) * _matmul("bto,bso->bts", gradients, gradients), (1, 2))

    return jnp.sqrt(_summed(model, paths, summarize, (), loss, rows)[0]) / SQUARED_AS


def gram(
    model: Model, paths: tuple[str, ...], loss: ExampleLoss, rows: Batch
) -> tuple[Float[Array, "B T"], Float[Array, "B B"]]:
    """(token losses, inner products of the rows' gradients), summed over the matrices; float32.

    Args and Raises as in `kronecker_features`.
    """

    def summarize(path, inputs, gradients, layer):
        return inner_products(inputs, gradients)

    found, token_losses = _summed(model, paths, summarize, (rows.num_rows,), loss, rows)
    return token_losses, found


def inner_products(inputs: Float[Array, "B T I"], gradients: Float[Array, "B T O"]) -> Float[Array, "B B"]:
    """<sum_t a_bt d_bt^T, sum_s a_cs d_cs^T> of all pairs of rows.

    Either sum_{t,s} <a_bt, a_cs> <d_bt, d_cs>, which takes B T (I + O) multiplications a token; or, where these are
    more, from the rows' gradients of a strip of the matrix at a time, which takes about I O.
    """
    (rows, tokens, width), outputs = inputs.shape, gradients.shape[-1]
    if rows * tokens * (width + outputs) <= width * outputs:

        def with_all(one):
            a, d = one
            return jnp.sum(_matmul("bti,si->bts", inputs, a) * _matmul("bto,so->bts", gradients, d), axis=(1, 2))

        return jax.lax.map(with_all, (inputs, gradients)).T

    blocks = math.ceil(width * rows * outputs / _BLOCK)
    size = math.ceil(width / blocks)
    blocks = math.ceil(width / size)
    padded = jnp.pad(inputs, ((0, 0), (0, 0), (0, blocks * size - width)))

    def add(total, number):
        a = jax.lax.dynamic_slice_in_dim(padded, number * size, size, axis=2)
        part = _matmul("bti,bto->bio", a, gradients).reshape(rows, -1)
        return total + jnp.matmul(part, part.T, precision="highest"), None

    total, _ = jax.lax.scan(add, jnp.zeros((rows, rows), jnp.float32), jnp.arange(blocks))
    return total


def _summed(model, paths, summarize, shape, loss, rows):
    """(summarize(path, inputs, output gradients, layer) [B, *shape] summed over `paths` and layers, token losses)."""
    check_routed(paths)
    for path in paths:
        if not layout.is_linear(path):
            raise ValueError(f"parameters: {path} is not a matrix of the blocks' linear layers; must be one here")

    def summed_loss(tap):
        def product(path, layer, x, weight):
            path = f"{layout.LAYERS}{path}"
            return _observed(partial(summarize, path), x, weight, tap, layer) if path in paths else x @ weight

        decoded = model.token_losses(rows, Hooks(product=product, frozen_head=True))
        return jnp.sum(jax.vmap(loss)(decoded.losses, rows)), decoded.losses

    tap = jnp.zeros((rows.num_rows, *shape), jnp.float32)
    return jax.grad(summed_loss, has_aux=True)(constrain(tap, BATCH_AXES, *(None,) * len(shape)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed(
    summarize: Callable[..., Float[Array, "B ..."]],
    x: Float[Array, "B T I"],
    weight: Float[Array, "I O"],
    tap: Float[Array, "B ..."],
    layer: Int[Array, ""],
) -> Float[Array, "B T O"]:
    """x @ weight; `tap` has the summary as gradient, the weight none."""
    return x @ weight


def _observed_fwd(summarize, x, weight, tap, layer):
    return x @ weight, (x, weight, layer)


def _observed_bwd(summarize, residuals, gradient):
    x, weight, layer = residuals
    return gradient @ weight.T, None, summarize(x, gradient, layer), None


_observed.defvjp(_observed_fwd, _observed_bwd)


def _matmul(subscripts, x, y):
    """In the dtype of x, where signs are exact; accumulated and returned in float32."""
    # The CPU backend lacks some products of bfloat16 that are float32.
    dtype = jnp.float32 if program_device().platform == "cpu" else x.dtype
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), precision="highest", preferred_element_type=jnp.float32
    )
