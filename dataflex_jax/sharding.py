"""Where arrays live: the device mesh, rules from parameter paths to mesh axes, and the collectives of ZeRO-3.

Parameters and optimizer state are split over "fsdp" (and heads, MLP channels and vocabulary over "tensor", experts over
"expert"); rows of the batch are split over "data", "fsdp" and "expert". A weight is cast to the compute dtype, gathered
over "fsdp" where it is used, and its gradient goes back as a sum that is split again. The functions that run inside a
model do nothing without a mesh (`jax.set_mesh`).
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.mesh import get_concrete_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from dataflex_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
SELDOM = "seldom"  # in the name of a conditional of which the branch that does nothing is nearly always taken

# (pattern for the end of a "/"-joined path, mesh axes a dimension): the first that matches decides. Of several axes of
# a dimension the first ones that divide it split it, and an axis that several dimensions name splits the first it can.
Rules = Sequence[tuple[str, P]]


def make_mesh(mesh_config: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "expert", "tensor") with Auto axes.

    Args:
        mesh_config: sizes by axis name (1 where absent); one of them may be -1: all remaining devices.
        devices: the devices to use; all of them by default.

    Raises:
        InputError: sizes that are not positive, more than one -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [mesh_config.get(axis, 1) for axis in AXES]
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(isinstance(s, bool) or not isinstance(s, int) or (s < 1 and s != -1) for s in sizes) or sizes.count(-1) > 1:
        raise InputError(f"{text}: sizes must be positive integers, and at most one may be -1 (the rest)")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        raise InputError(f"{text}: the product must be the number of devices, {len(devices)}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def program_device() -> jax.Device:
    """A device that the program which is being traced is for: of the mesh that is set, else of this process.

    Its `platform` is "cpu" or "gpu", and a GPU has a `compute_capability` such as "9.0". It may be one of
    `jax.experimental.topologies`, which is not there to run on.
    """
    # There is no public name for it while a program is traced: `jax.sharding.get_mesh` refuses.
    mesh = get_concrete_mesh()
    return jax.local_devices()[0] if mesh.empty else mesh.devices.flat[0]


def param_shardings(mesh: Mesh, tree: PyTree, rules: Rules) -> PyTree:
    """A `NamedSharding` for every leaf of parameters or of anything whose paths end in theirs (optimizer state).

    A mesh axis that does not divide the dimension is dropped; leaves that no rule names are replicated.

    Args:
        mesh: the mesh.
        tree: arrays or `jax.ShapeDtypeStruct`s.
        rules: of the parameters.
    """

    def place(path, leaf):
        return NamedSharding(mesh, _resolved(_spec(leaf_name(path), leaf.ndim, rules), leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(mesh: Mesh, shapes: PyTree, rules: Rules) -> PyTree:
    """The `jax.ShapeDtypeStruct`s of `shapes` with the shardings of `param_shardings`."""

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, param_shardings(mesh, shapes, rules))


def shardings(abstract: PyTree) -> PyTree:
    """Of a tree that `placed` gave."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) split over `BATCH_AXES`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Asks XLA to lay `x` out over the mesh that is set; leaves it alone without one.

    A dimension whose axes do not divide it, or are already manual, is left to XLA. So an example under `jax.vmap` (a
    batch of one) keeps whatever split the mapped axis has.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: mesh.shape[name] for name in mesh.axis_names if name in mesh.auto_axes}
    if math.prod(sizes.values()) == 1:
        return x
    fitted = _divisible(P(*axes), x.shape, sizes)
    spec = (want if want == got else P.UNCONSTRAINED for want, got in zip(axes, fitted, strict=True))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def gather_weights(
    params: PyTree, dtype: jnp.dtype, prefix: str, rules: Rules, as_stored: Collection[str] = ()
) -> PyTree:
    """One layer's parameters as its matmuls want them: kernels cast to `dtype`, then gathered over "fsdp".

    The cast comes first so that the gather moves `dtype`. The gradient of a kernel comes back split over "fsdp".

    Args:
        params: one layer's parameters; what has fewer than two axes (norm scales, biases) is returned as it is.
        dtype: the compute dtype.
        prefix: the path of the stacked parameters, such as "layers".
        rules: for the stacked parameters.
        as_stored: paths of stacked parameters that are whole on every device, and are returned as they are.
    """
    return _of_weights(lambda leaf, axes: gather_weight(leaf, dtype, axes), params, prefix, rules, as_stored)


def cast_weights(
    params: PyTree, dtype: jnp.dtype, prefix: str, rules: Rules, as_stored: Collection[str] = ()
) -> PyTree:
    """The first half of `gather_weights`, whose arguments it has: kernels cast to `dtype`, split as they were."""
    return _of_weights(lambda leaf, axes: constrain(leaf.astype(dtype), *axes), params, prefix, rules, as_stored)


def _of_weights(
    function: Callable[[Array, tuple], Array], params: PyTree, prefix: str, rules: Rules, as_stored: Collection[str]
) -> PyTree:
    """One layer's parameters after a function of each kernel and the mesh axes of its dimensions."""

    def of(path, leaf):
        name = f"{prefix}/{leaf_name(path)}"
        if leaf.ndim < 2 or name in as_stored:
            return leaf
        axes = _spec(name, leaf.ndim + 1, rules)[1:]
        return function(leaf, tuple(_resolved(axes, leaf.shape, jax.sharding.get_abstract_mesh().shape)))

    return jax.tree_util.tree_map_with_path(of, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(weight: Array, dtype: jnp.dtype, axes: tuple[str | tuple[str, ...] | None, ...]) -> Array:
    """A weight that is split over `axes`, cast to `dtype` and then gathered over "fsdp"; see `gather_weights`."""
    split = constrain(weight.astype(dtype), *axes)
    return constrain(split, *map(_without_fsdp, axes))


def _without_fsdp(axes: str | tuple[str, ...] | None) -> str | None:
    others = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != "fsdp")
    return others[0] if len(others) == 1 else others or None


def _gather_fwd(weight, dtype, axes):
    return gather_weight(weight, dtype, axes), jnp.zeros((), weight.dtype)


def _gather_bwd(dtype, axes, residual, grad):
    # Constrained here, not by the transpose of the gather: that would sum the whole gradient onto every device.
    return (constrain(grad, *axes).astype(residual.dtype),)


gather_weight.defvjp(_gather_fwd, _gather_bwd)


def rows_are_split(num_rows: int) -> bool:
    """Whether a mesh is set whose axes are all automatic and split `num_rows` evenly, so that `map_rows` applies."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.auto_axes):
        return False
    return num_rows % row_shards(mesh) == 0


def weights_are_split() -> bool:
    """Whether a mesh is set that splits weights over "fsdp", so that they are gathered where they are used."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def map_rows(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the mesh that is set: collectives are what `fn` says and where it says."""
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def divisible_axis(axis: str, dim: int) -> str | None:
    """`axis` where it splits `dim`, as `param_shardings` decides it, else None."""
    size = jax.sharding.get_abstract_mesh().shape[axis]
    return axis if size > 1 and dim % size == 0 else None


def all_gather(x: Array, dim: int, axis: str | None) -> Array:
    """Inside `map_rows`: the parts of `x` joined along `dim` (`axis` from `divisible_axis`)."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def all_to_all(x: Array, split: int, joined: int, axis: str | None) -> Array:
    """Inside `map_rows`: `x` is split along `split` into parts, one for each device of `axis` (from `divisible_axis`);
    what a device is sent is joined along `joined`."""
    return x if axis is None else jax.lax.all_to_all(x, axis, split, joined, tiled=True)


def reduce_grad(grad: Float[Array, "..."], dim: int, axis: str | None) -> Float[Array, "..."]:
    """Inside `map_rows`: the sum of `grad` over all rows, split along `dim` over `axis` ("fsdp" or None)."""
    if axis is None:
        return jax.lax.psum(grad, BATCH_AXES)
    others = tuple(name for name in BATCH_AXES if name != axis)
    return jax.lax.psum(jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True), others)


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    """A leaf's path in its tree, joined with "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, ndim: int, rules: Rules) -> P:
    for pattern, spec in rules:
        # Factored moments end in a parameter's path with fewer axes than it has.
        if len(spec) == ndim and re.search(rf"(^|/)({pattern})$", name):
            return spec
    return P(*(None,) * ndim)


def _divisible(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    def keep(axis, dim):
        names = (axis,) if isinstance(axis, str) else axis or ()
        return axis if all(n in sizes for n in names) and dim % math.prod(sizes[n] for n in names) == 0 else None

    return P(*(keep(axis, dim) for axis, dim in zip(spec, shape, strict=True)))


def _resolved(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """What of a rule's axes splits an array of this shape."""
    found, used = [], set()
    for axes, dim in zip(spec, shape, strict=True):
        names = []
        for name in (axes,) if isinstance(axes, str) else axes or ():
            if name in used or name not in sizes or dim % math.prod(sizes[other] for other in (*names, name)):
                break
            names.append(name)
        used.update(names)
        found.append(names[0] if len(names) == 1 else tuple(names) or None)
    return P(*found)
