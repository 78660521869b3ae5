"""Rows sent to the experts that they go to, and what comes back: on one device, and over a mesh.

R rows of D channels, each with K slots: visits to one of E experts of width F. Slots are sorted by expert and computed
in N blocks of S places, each of one expert; only the last block of each expert is padded. So no array is larger than
the slots' inputs, the products are those of the chosen experts, and no slot is left out.
`jax.lax.ragged_dot` would do, but off TPUs it is lowered to products of all experts with all slots, and it cannot be
vmapped beside weights that are shared, as per-example gradients are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.models import grouped
from dataflex_jax.models.swiglu import Weights, swiglu
from dataflex_jax.sharding import SELDOM, program_device

# Places of a block: a twelfth of the experts' average, which bounds the padding; more, up to a quarter, while there are
# too few for the products and for reading the expert's weights to be quick.
LEAST_SLOTS, QUICK_SLOTS, MOST_SLOTS = 64, 128, 512
# Slots that a device can send to another in one round, as a multiple of their average.
SLACK = 1.25


class Places(NamedTuple):
    """Where the slots are.

    Attributes:
        slot: at each place; 0 where there is none.
        real: whether there is one.
        place: of each slot of each row; 0 where it has none.
        there: whether it has one.
    """

    slot: Int[Array, " P"]
    real: Bool[Array, " P"]
    place: Int[Array, "R K"]
    there: Bool[Array, "R K"]

    def of_slots(self) -> "Places":
        """The same, where each slot is a row of its own."""
        return self._replace(place=self.place.reshape(-1, 1), there=self.there.reshape(-1, 1))


@jax.custom_vjp
def spread(x: Float[Array, "R D"], places: Places) -> Float[Array, "P D"]:
    """At each place the row of its slot; 0 where there is none."""
    return jnp.where(places.real[:, None], x[places.slot // places.place.shape[1]], 0)


@jax.custom_vjp
def collected(y: Float[Array, "P D"], places: Places) -> Float[Array, "R D"]:
    """The sum over the places of each row's slots; float32."""
    slots = zip(places.place.T, places.there.T, strict=True)
    # One slot after the other, because CPUs would make an array of all of them first.
    return sum(jnp.where(there[:, None], y[place], 0).astype(jnp.float32) for place, there in slots)


def _spread_fwd(x, places):
    return spread(x, places), (places, jnp.zeros((), x.dtype))


def _spread_bwd(residuals, dy):
    # Each is the transpose of the other. Left to JAX, gathers would become additions in no certain order.
    places, like = residuals
    return collected(dy, places).astype(like.dtype), None


def _collected_fwd(y, places):
    return collected(y, places), (places, jnp.zeros((), y.dtype))


def _collected_bwd(residuals, dx):
    places, like = residuals
    return spread(dx.astype(like.dtype), places), None


spread.defvjp(_spread_fwd, _spread_bwd)
collected.defvjp(_collected_fwd, _collected_bwd)


def mixed(
    x: Float[Array, "R D"], factors: Float[Array, "R K"], experts: Int[Array, "R K"], weights: Weights
) -> Float[Array, "R D"]:
    """sum_k factor_k (silu(x G_e) * (x U_e)) D_e, with e the expert of slot k; float32.

    Args:
        x: the rows.
        factors: of their slots, float32.
        experts: of their slots; E: none.
        weights: of the experts, in the dtype of `x`.
    """
    number, _, width = weights.gate.shape
    by_kernel = program_device().platform == "gpu" and grouped.fits(x.shape[1], width)
    places, grouping, size = _blocks(experts, number, by_kernel)
    inputs = spread(x, places).reshape(-1, size, x.shape[1])
    scales = spread(factors.reshape(-1, 1), places.of_slots()).reshape(-1, size)
    outputs = swiglu(inputs, scales, grouping, weights, by_kernel)
    return collected(outputs.reshape(-1, x.shape[1]), places)


def exchanged(
    x: Float[Array, "R D"], factors: Float[Array, "R K"], experts: Int[Array, "R K"], weights: Weights, axis: str
) -> Float[Array, "R D"]:
    """As `mixed`, inside a `shard_map` over a mesh axis that splits the experts.

    A device sends each slot's row to the one that has its expert, and gets back what comes of it. Arrays have a fixed
    size, and any expert may be asked for by all slots; so the exchange has rounds, in each of which a device sends
    every other one at most `SLACK` times the average, and goes on until the last slot of all devices is through. One
    round is enough unless the load is uneven.

    Args:
        x: this device's rows.
        factors: as in `mixed`.
        experts: numbers among those of all devices.
        weights: of this device's experts.
        axis: of the mesh.
    """
    devices, here, slots = jax.lax.axis_size(axis), weights.gate.shape[0], experts.size
    capacity = min(slots, math.ceil(SLACK * slots / devices / 16) * 16)
    numbers = experts.reshape(-1)
    owner = numbers // here
    order, rank, first, counts = _sorted(owner, devices)
    mesh = jax.sharding.get_abstract_mesh()
    needed = jax.lax.pmax(-(-jnp.max(counts) // capacity), mesh.axis_names)

    def exchange(rows):
        return jax.lax.all_to_all(rows, axis, 0, 0, tiled=True)

    # Only the operands are kept for the backward pass, in which the rows are sent again.
    @jax.checkpoint
    def in_round(number, x, factors, weights):
        ranks = number * capacity + jnp.arange(capacity)
        real = (ranks < counts[:, None]).reshape(-1)
        slot = jnp.where(real, order[jnp.minimum(first[:, None] + ranks, slots - 1).reshape(-1)], 0)
        there = rank // capacity == number
        place = jnp.where(there, owner * capacity + rank % capacity, 0)
        places = Places(slot, real, place.reshape(experts.shape), there.reshape(experts.shape))
        rows, scales = spread(x, places), spread(factors.reshape(-1, 1), places.of_slots())
        wanted = jnp.where(real, numbers[slot] % here, here)
        outputs = mixed(exchange(rows), exchange(scales), exchange(wanted)[:, None], weights)
        return collected(exchange(outputs.astype(x.dtype)), places)

    y, rounds = in_round(0, x, factors, weights), math.ceil(slots / capacity)
    if rounds == 1:
        return y

    def another(y, number):
        more = jax.lax.cond(number < needed, in_round, lambda *_: jnp.zeros_like(y), number, x, factors, weights)
        return y + more, None

    with jax.named_scope(SELDOM):
        return jax.lax.cond(needed > 1, lambda y: jax.lax.scan(another, y, jnp.arange(1, rounds))[0], lambda y: y, y)


def _sorted(groups: Int[Array, " slots"], number: int):
    """(slots in the order of their groups, each slot's rank in its group, first place and size of each group)."""
    # Not a scatter, in which thousands of additions to one number would wait for each other on GPUs.
    counts = jnp.sum(groups[:, None] == jnp.arange(number), axis=0, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts
    order = jnp.argsort(groups, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True) - first[groups]
    return order, rank, first, counts


def _blocks(experts: Int[Array, "R K"], number: int, by_kernel: bool) -> tuple[Places, grouped.Grouping, int]:
    """(places, the blocks that they are in, places of a block)."""
    numbers, slots = experts.reshape(-1), experts.size
    size = _kernel_size(slots, number) if by_kernel else _size(slots, number)
    blocks = slots // size + min(number, slots)
    order, rank, first_slot, counts = _sorted(numbers, number)
    needed = -(-counts // size)
    first = jnp.cumsum(needed) - needed
    expert = jnp.searchsorted(first + needed, jnp.arange(blocks), side="right", method="compare_all")
    expert = jnp.minimum(expert, number - 1)
    ranks = ((jnp.arange(blocks) - first[expert]) * size)[:, None] + jnp.arange(size)
    real = (ranks < counts[expert][:, None]).reshape(-1)
    slot = jnp.where(real, order[jnp.minimum(first_slot[expert][:, None] + ranks, slots - 1).reshape(-1)], 0)
    there = numbers < number
    place = jnp.where(there, first[numbers] * size + rank, 0)
    places = Places(slot, real, place.reshape(experts.shape), there.reshape(experts.shape))
    return places, grouped.Grouping(expert, jnp.sum(needed), first, needed), size


def _size(slots: int, number: int) -> int:
    average = math.ceil(slots / number)
    size = max(min(MOST_SLOTS, average // 12), min(QUICK_SLOTS, average // 4))
    return min(max(LEAST_SLOTS, size // 16 * 16), average)


def _kernel_size(slots: int, number: int) -> int:
    """The power of two up to an eighth of the average, so that about a sixteenth is padding."""
    eighth = max(1, slots // number // 8)
    return min(max(1 << (eighth.bit_length() - 1), grouped.LEAST_ROWS), grouped.MOST_ROWS)
