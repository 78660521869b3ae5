"""Exact nearest neighbours and kernel densities: tiles of distances on all devices, and the best of each query."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

# A device has the distances of so many queries from so many points at a time, 32 MiB. Tiles are long, because the best
# of a query are sorted once a tile; a tile serves a round of queries, whose best so far are on the devices too.
_QUERIES = 64
_POINTS = 2**17
_ROUND = 4096


class Neighbours(NamedTuple):
    """The nearest points of each query.

    Attributes:
        ids: places of the points, int32, the nearest first; of equal distances the lower place first.
        distances: theirs (L2), float32.
        closest: the distance of each point from the query nearest to it; NaN for points that are nobody's neighbours.
    """

    ids: Int[np.ndarray, "M k"]
    distances: Float[np.ndarray, "M k"]
    closest: Float[np.ndarray, " N"]


def usable(points: Float[np.ndarray, "N d"]) -> Bool[np.ndarray, " N"]:
    """Which points may be neighbours: those that are finite and not zero."""
    squares = np.einsum("nd,nd->n", points, points)
    return np.isfinite(squares) & (squares > 0)


def nearest(queries: Float[np.ndarray, "M d"], points: Float[np.ndarray, "N d"], k: int) -> Neighbours:
    """The `k` nearest points of each query, by all distances in float32.

    The points are split over the devices of the mesh that is set. Memory there does not grow with M or N: both are
    streamed in tiles.

    Args:
        queries: finite, float32.
        points: float32, at least one of which is usable; those that are not (see `usable`) are nobody's neighbours.
        k: how many, at least 1; all usable ones where there are fewer.
    """
    known = usable(points)
    tiles, k = _Tiles(points, known, _mean(queries)), min(k, int(known.sum()))
    rounds = [_search(tiles, part, k) for part in _rounds(queries)]
    closest = np.sqrt(np.min([least for _, _, least in rounds], axis=0))
    return Neighbours(
        ids=np.concatenate([ids for ids, _, _ in rounds]),
        distances=np.sqrt(np.concatenate([squares for _, squares, _ in rounds])),
        closest=np.where(np.isfinite(closest), closest, np.float32(np.nan)),
    )


def kernel_densities(points: Float[np.ndarray, "N d"], k: int, sigma: float) -> Float[np.ndarray, " N"]:
    """`sum_l max(0, 1 - |x - x_l|^2 / sigma^2)` over the `k` points x_l nearest to each point x, itself among them.

    Where no point has more than `k` within `sigma`, nothing is sorted: all others add 0.

    Args:
        points: usable ones, float32.
        k: how many points are summed over, at least 1.
        sigma: width of the kernel, >= 0; where it is 0 a point counts itself alone.

    Returns:
        float64, at least about 1.
    """
    if sigma == 0:
        return np.ones(len(points))
    tiles, densities, crowded = _Tiles(points, np.ones(len(points), bool), _mean(points)), [], False
    for part in _rounds(points):
        if not crowded:
            density, within = _sums(tiles, part, sigma)
            crowded = within.max() > k
        if crowded:
            squares = _search(tiles, part, min(k, len(points)))[1].astype(np.float64)
            density = np.maximum(0, 1 - squares / sigma**2).sum(axis=1)
        densities.append(density)
    return np.concatenate(densities)


def _mean(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    # Hidden states share a large offset, in which the differences that count would be rounded away.
    return np.mean(points, axis=0, dtype=np.float64).astype(np.float32)


def _rounds(queries: Float[np.ndarray, "M d"]) -> Iterator[Float[np.ndarray, "m d"]]:
    return (queries[start : start + _ROUND] for start in range(0, len(queries), _ROUND))


class _Tile(NamedTuple):
    """Some of the points, without the offset, split over the devices.

    Attributes:
        first: the place of the first.
        points: 0 where they may not be neighbours.
        norms: squared; infinite where they may not be.
    """

    first: Int[np.ndarray, ""]
    points: Float[Array, "n d"]
    norms: Float[Array, " n"]


class _Tiles:
    """All points, as tiles of one size.

    Args:
        points: float32.
        known: which may be neighbours.
        offset: is subtracted of them, and of queries.
    """

    def __init__(
        self, points: Float[np.ndarray, "N d"], known: Bool[np.ndarray, " N"], offset: Float[np.ndarray, " d"]
    ):
        mesh = jax.sharding.get_mesh()
        self.mesh = jax.make_mesh((1,), ("data",), devices=jax.local_devices()[:1]) if mesh.empty else mesh
        self._points, self._known, self._offset = points, known, offset
        count = -(-len(points) // (_POINTS * self.mesh.size))
        self._size = self.mesh.size * -(-len(points) // (count * self.mesh.size))
        # A tile that is all of them stays on the devices.
        self._tile = functools.lru_cache(1)(self._placed)

    @property
    def num_points(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[_Tile]:
        return (self._tile(first) for first in range(0, len(self._points), self._size))

    def blocks(self, queries: Float[np.ndarray, "m d"]) -> list[Float[Array, "b d"]]:
        """Queries without the offset, in equal parts, the last one filled up with the last query."""
        count = -(-len(queries) // _QUERIES)
        size = -(-len(queries) // count)
        queries = np.pad(queries - self._offset, ((0, size * count - len(queries)), (0, 0)), mode="edge")
        return [self._on_all(part) for part in np.split(queries, count)]

    def _placed(self, first: int) -> _Tile:
        split = NamedSharding(self.mesh, P(self.mesh.axis_names))

        def part(index: tuple[slice, ...]) -> slice:
            start, stop, _ = index[0].indices(self._size)
            return slice(first + start, first + stop)

        def filled(rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            found, wanted = rows[part(index)], part(index)
            missing = wanted.stop - wanted.start - len(found)
            return np.pad(found, ((0, missing), *((0, 0),) * (rows.ndim - 1))) if missing else found

        points, known = (
            jax.make_array_from_callback((self._size, *rows.shape[1:]), split, functools.partial(filled, rows))
            for rows in (self._points, self._known)
        )
        return _Tile(np.int32(first), *_centred(points, known, self._on_all(self._offset)))

    def _on_all(self, values: np.ndarray) -> Array:
        return jax.make_array_from_callback(values.shape, NamedSharding(self.mesh, P()), values.__getitem__)


@jax.jit
def _centred(
    points: Float[Array, "n d"], known: Bool[Array, " n"], offset: Float[Array, " d"]
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    points = jnp.where(known[:, None], points - offset, 0.0)
    return points, jnp.where(known, jnp.sum(points**2, axis=1), jnp.inf)


class _Best(NamedTuple):
    """The nearest points so far, the nearest first."""

    ids: Int[Array, "m k"]
    squares: Float[Array, "m k"]


_NOTHING = _Best(np.empty(0, np.int32), np.empty(0, np.float32))


def _search(
    tiles: _Tiles, queries: Float[np.ndarray, "m d"], k: int
) -> tuple[Int[np.ndarray, "m k"], Float[np.ndarray, "m k"], Float[np.ndarray, " N"]]:
    """Of each query its neighbours and their squared distances; the least of each point."""
    search = _of_tile_on_host if _host_selects(tiles.mesh) else _of_tile
    blocks = tiles.blocks(queries)
    best: list[_Best | None] = [None] * len(blocks)
    closest = []
    for tile in tiles:
        best, least = search(tiles.mesh, best, blocks, tile, k)
        closest.append(least)
    ids, squares = (np.concatenate([np.asarray(part[i]) for part in best])[: len(queries)] for i in range(2))
    return ids, squares, np.concatenate(closest)[: tiles.num_points]


def _host_selects(mesh: Mesh) -> bool:
    # XLA sorts whole rows on a CPU, where NumPy only parts them.
    return jax.process_count() == 1 and mesh.devices.flat[0].platform == "cpu"


def _of_tile(
    mesh: Mesh, best: list[_Best | None], blocks: list[Float[Array, "b d"]], tile: _Tile, k: int
) -> tuple[list[_Best | None], Float[np.ndarray, " n"]]:
    """The best of each block with a tile's points among them; the least of each of these."""
    merge, merged = _merging(mesh, k), []
    least = np.float32(np.inf)
    for before, block in zip(best, blocks, strict=True):
        # A device would otherwise have the distances of many blocks at once.
        jax.block_until_ready(merged[-2:-1])
        found, of_block = merge(before, block, tile)
        merged.append(found)
        least = jnp.minimum(least, of_block)
    return merged, _whole(mesh)(least)


def _of_tile_on_host(
    mesh: Mesh, best: list[_Best | None], blocks: list[Float[Array, "b d"]], tile: _Tile, k: int
) -> tuple[list[_Best | None], Float[np.ndarray, " n"]]:
    """As `_of_tile`, where the host has the devices' memory."""
    merged, least = [], np.float32(np.inf)
    ahead = _jitted_squares(blocks[0], tile)
    for before, following in zip(best, [*blocks[1:], None], strict=True):
        squares, ahead = np.asarray(ahead), None if following is None else _jitted_squares(following, tile)
        least = np.minimum(least, squares.min(axis=0))
        before = [_NOTHING] * len(squares) if before is None else map(_Best, *before)
        rows = [_merged_row(of_row, row, tile.first, k) for of_row, row in zip(before, squares, strict=True)]
        merged.append(_Best(*map(np.stack, zip(*rows, strict=True))))
    return merged, least


def _merged_row(best: _Best, squares: Float[np.ndarray, " n"], first: int, k: int) -> _Best:
    """A query's best with a tile's points among them, the nearest first; of equal ones the lower place first."""
    if len(best.ids) == k:
        places = np.flatnonzero(squares < best.squares[-1])
    elif len(squares) > k:
        places = np.flatnonzero(squares <= np.partition(squares, k - 1)[k - 1])
    else:
        places = np.arange(len(squares))
    ids, found = np.append(best.ids, first + places), np.append(best.squares, squares[places])
    order = np.argsort(found, kind="stable")[:k]
    return _Best(ids[order], found[order])


def _sums(
    tiles: _Tiles, points: Float[np.ndarray, "m d"], sigma: float
) -> tuple[Float[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Of each point the kernel's sum over all points, float64, and how many of these are within `sigma`."""
    add, blocks = _adding(tiles.mesh), tiles.blocks(points)
    sums: list = [(0.0, 0)] * len(blocks)
    for tile in tiles:
        for number, block in enumerate(blocks):
            more = (np.asarray(part) for part in add(block, tile, np.float32(sigma)))
            sums[number] = tuple(before + after for before, after in zip(sums[number], more, strict=True))
    density, within = (np.concatenate([part[i] for part in sums])[: len(points)] for i in range(2))
    return density.astype(np.float64), within


@functools.cache
def _whole(mesh: Mesh):
    gathered = jax.jit(lambda values: values, out_shardings=NamedSharding(mesh, P()))
    return lambda values: np.asarray(gathered(values))


@functools.cache
def _merging(mesh: Mesh, k: int):
    """The jitted (best of earlier tiles, queries, tile) -> (best of all, least distance of each point of the tile)."""
    axes = mesh.axis_names

    def merged(best: _Best | None, queries: Float[Array, "m d"], tile: _Tile) -> tuple[_Best, Float[Array, " n"]]:
        squares = _squares(queries, tile)
        least = _least(squares)
        if best is not None and best.squares.shape[1] == k:
            # What is not among the best of this device would have to be sorted in; of equals the earlier tile's is.
            squares = jnp.where(squares < best.squares[:, -1:], squares, jnp.inf)
        here = _lowest(squares, k)
        first = tile.first + jax.lax.axis_index(axes) * squares.shape[1]
        found = _Best(first + here.ids, here.squares)
        if mesh.size > 1:
            found = _Best(*(jax.lax.all_gather(part, axes, axis=1, tiled=True) for part in found))
        parts = [found] if best is None else [best, found]
        if len(parts) == mesh.size == 1:
            return found, least
        # Of equal distances the first is taken, which is the one with the lower id.
        ids, squares = (jnp.concatenate([part[i] for part in parts], axis=1) for i in range(2))
        lowest = _lowest(squares, k)
        return _Best(jnp.take_along_axis(ids, lowest.ids, axis=1), lowest.squares), least

    split = _Tile(P(), P(axes), P(axes))
    mapped = jax.shard_map(merged, mesh=mesh, in_specs=(P(), P(), split), out_specs=(P(), P(axes)), check_vma=False)
    return jax.jit(mapped)


@functools.cache
def _adding(mesh: Mesh):
    """The jitted (points, tile, sigma) -> (sum of the kernel over the tile, points of the tile within sigma)."""
    axes = mesh.axis_names

    def sums(points: Float[Array, "m d"], tile: _Tile, sigma: Float[Array, ""]):
        kernel = jnp.maximum(0.0, 1 - _squares(points, tile) / sigma**2)
        within = jnp.sum(kernel > 0, axis=1, dtype=jnp.int32)
        return jax.lax.psum((jnp.sum(kernel, axis=1), within), axes)

    split = _Tile(P(), P(axes), P(axes))
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(P(), split, P()), out_specs=P(), check_vma=False))


def _squares(queries: Float[Array, "m d"], tile: _Tile) -> Float[Array, "m n"]:
    inner = jnp.matmul(queries, tile.points.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(queries**2, axis=1)[:, None] + tile.norms - 2 * inner, 0.0)


_jitted_squares = jax.jit(_squares)


def _least(squares: Float[Array, "m n"]) -> Float[Array, " n"]:
    # By halves, because a CPU reduces a leading axis ten times slower.
    while (rows := squares.shape[0]) > 1:
        half = (rows + 1) // 2
        squares = jnp.minimum(squares[:half], squares[rows - half :])
    return squares[0]


def _lowest(squares: Float[Array, "m n"], k: int) -> _Best:
    """The lowest of each row, all where there are fewer than k, of equal ones the first; their places for ids."""
    k = min(k, squares.shape[1])
    negated, places = jax.lax.top_k(-squares, k)
    return _Best(places, -negated)
