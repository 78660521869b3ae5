"""A vocabulary that grows: rows for tokens that a checkpoint's embedding and output head do not have yet."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from dataflex_jax.models import layout, parts

# Where the tokens are, by parameter.
_AXES = {"embed_tokens/embedding": 0, "lm_head/kernel": 1}


def of_size(abstract: PyTree, vocab_size: int) -> PyTree:
    """The shapes, dtypes and shardings of all parameters or a part of them, for another number of tokens."""

    def resized(path, leaf):
        axis = _AXES.get(layout.row(path).path)
        if axis is None:
            return leaf
        shape = (*leaf.shape[:axis], vocab_size, *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    return layout.placed(mesh, jax.tree_util.tree_map_with_path(resized, abstract))


def grown(params: PyTree[Array], abstract: PyTree) -> PyTree[Array]:
    """The parameters with as many tokens as `abstract` has; every new one is the mean of those that there were.

    So it is as likely as the average token at first, and no unknown one drowns those that were trained.
    """

    wanted = dict(parts.leaves(abstract))

    def fitted(path, leaf):
        name = layout.row(path).path
        if name not in _AXES or name not in wanted:
            return leaf
        axis, like = _AXES[name], wanted[name]
        missing = like.shape[axis] - leaf.shape[axis]
        return _grown(leaf, axis, missing, like.sharding) if missing > 0 else leaf

    return jax.tree_util.tree_map_with_path(fitted, params)


def grown_paths(abstract: PyTree) -> list[str]:
    """The parameters that a growing vocabulary changes, among all or a part of them."""
    return [path for path in parts.paths(abstract) if path in _AXES]


@functools.partial(jax.jit, static_argnames=("axis", "missing", "sharding"))
def _grown(param: Array, axis: int, missing: int, sharding: jax.sharding.Sharding) -> Array:
    mean = jnp.mean(param.astype(jnp.float32), axis=axis, keepdims=True).astype(param.dtype)
    whole = jnp.concatenate([param, jnp.repeat(mean, missing, axis=axis)], axis=axis)
    return jax.lax.with_sharding_constraint(whole, sharding)
