"""Parameters in two parts, those that are trained and those that are not, and what tells parameters from others.

Both parts are nested dicts with disjoint leaves, which `split` takes apart and `combined` puts together; neither
computes anything. `Model` holds the two.
"""

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

from dataflex_jax.errors import InputError
from dataflex_jax.models.layout import FACTORS


def split(params: PyTree, trained: Callable[[str], bool], prefix: str = "") -> tuple[PyTree, PyTree]:
    """(frozen, trained): the leaves whose "/"-joined path, after `prefix`, `trained` refuses, and those it accepts."""
    parts = {}, {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if not isinstance(value, dict):
            parts[trained(path)][name] = value
            continue
        for tree, part in zip(parts, split(value, trained, f"{path}/"), strict=True):
            if part:
                tree[name] = part
    return parts


def combined(frozen: PyTree | None, trained: PyTree) -> PyTree:
    """The parameters of which these are the parts; `trained` itself where nothing is frozen."""
    if not frozen:
        return trained
    whole = dict(frozen)
    for name, value in trained.items():
        whole[name] = combined(frozen.get(name), value) if isinstance(value, dict) else value
    return whole


def leaves(params: PyTree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def paths(params: PyTree) -> list[str]:
    """The path of every leaf."""
    return [path for path, _ in leaves(params)]


def is_adapter(path: str) -> bool:
    """Whether the parameter is a factor of a low-rank adapter."""
    return path.endswith(FACTORS)


def trained_paths(params: PyTree, patterns: Sequence[str] | None) -> Callable[[str], bool] | None:
    """Which parameters a run trains, as a function of their paths; None: all.

    Args:
        params: all parameters, or their shapes. Where there are adapters among them, these are trained.
        patterns: of the paths of those trained (beside adapters), as file names in the shell, `*` matching "/" too; one
            that begins with "!" takes away again what it matches. None: all, or the adapters alone.

    Raises:
        InputError: a pattern that matches no parameter, or nothing to train.
    """
    names = paths(params)
    adapted = any(map(is_adapter, names))
    if patterns is None:
        return is_adapter if adapted else None
    for pattern in patterns:
        if not fnmatch.filter(names, pattern.removeprefix("!")):
            reason = f"{pattern!r} matches no parameter; they are {', '.join(names)}"
            raise InputError(reason, option="model.trainable")
    frozen = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    chosen = [pattern for pattern in patterns if not pattern.startswith("!")]

    def trained(path: str) -> bool:
        among = any(fnmatch.fnmatchcase(path, pattern) for pattern in chosen)
        return is_adapter(path) or (among and not any(fnmatch.fnmatchcase(path, pattern) for pattern in frozen))

    if not any(map(trained, names)):
        raise InputError("nothing would be trained; None trains all", option="model.trainable", value=tuple(patterns))
    return trained


def fingerprint(params: PyTree) -> str:
    """16 hex digits that tell parameters from others: of paths, shapes, dtypes and bits, however they are sharded.

    Each array is summed up on its devices; nothing else comes to the host.
    """
    checksums = jax.device_get(jax.tree.map(_checksum, params))
    digest = hashlib.sha256()
    for (path, leaf), checksum in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(checksums), strict=True
    ):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {checksum}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    """A sum modulo 2^32 of every number's bits mixed with its place; integers, so the order does not matter."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # The finalizer of MurmurHash3 over both.
    mixed = bits * jnp.uint32(0xCC9E2D51) + place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
