"""A function of rows over a whole set of rows: in length buckets, sharded, as fast as the devices take them.

A row's result depends neither on its batch nor on its place, so results are the same at every batch size, on every mesh
and in every order; they come back by row.
"""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int64, PyTree, Shaped
from tqdm import tqdm

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.loader import Loader
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.rows import bucket_of
from dataflex_jax.sharding import batch_sharding, replicated, row_shards

# (operands, batch, or where the rows have numbers (batch, these)) -> an entry a row
SweepFunction = Callable[[PyTree, Any], PyTree]
# (operands, (batch, the rows' numbers [B]), the total so far) -> the total
FoldFunction = Callable[[PyTree, tuple[Batch, jax.Array], PyTree], PyTree]

_GIB = 2**30
_HOST_MEMORY = _GIB  # where the backend does not say what it has
_SHARE = 0.8  # of the free memory of a device
_MOST_ROWS = 256  # a device; more do not run faster
_IN_FLIGHT = 2


class Source(NamedTuple):
    """Rows, how long they are, and what makes batches of them.

    Attributes:
        pool: the rows.
        lengths: inputs of each.
        loader: makes batches.
        together: rows that are asked for together; a batch of fewer is filled up to as many, so that few sizes of
            batches are compiled.
    """

    pool: Pool
    lengths: Int64[np.ndarray, " N"]
    loader: Loader
    together: int = 1


def source(pool: Pool, mesh: Mesh) -> Source:
    """The rows of `pool` for sweeps."""
    return Source(pool, pool.lengths(), Loader(pool, mesh))


class Sweeper:
    """Runs functions over sets of rows; compiles each once for each length and kind of operands.

    Args:
        mesh: the devices.
        rows: of a batch, over all devices; None: as many as fit into the free memory of a device.
        memory: bytes of a device that a batch may take; None: most of what is free.
        poll: called between two batches; what it raises ends the sweep.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        rows: int | None = None,
        memory: int | None = None,
        poll: Callable[[], None] = lambda: None,
    ):
        self.mesh, self._rows, self._memory, self._poll = mesh, rows, memory, poll
        self._shards = row_shards(mesh)
        self._compiled: dict[tuple, Any] = {}
        self._tokens: dict[tuple, int] = {}
        self._note: Callable[[str], None] = lambda text: None  # to the bar of the sweep that runs

    def run(
        self,
        function: SweepFunction,
        operands: PyTree,
        rows: Source,
        ids: Int64[np.ndarray, " n"],
        description: str,
        numbers: Shaped[np.ndarray, "n ..."] | None = None,
    ) -> PyTree:
        """`function(operands, batch)` of the rows `ids`.

        Args:
            function: pure; its results have the batch's rows as leading axis. Traced anew only if it is another object.
            operands: its arrays, such as parameters.
            rows: where they come from.
            ids: which ones.
            description: for the progress bar.
            numbers: of each row, which the function is then given beside the batch; rows of padding have 0.

        Returns:
            NumPy arrays, entry `i` of row `ids[i]`.
        """
        results: list[np.ndarray] | None = None
        structure = None
        bar = tqdm(total=len(ids), desc=description, unit="rows", disable=jax.process_index() > 0, leave=False)
        pending: collections.deque = collections.deque()

        def collect() -> None:
            nonlocal results, structure
            places, output = pending.popleft()
            leaves, structure = jax.tree.flatten(jax.device_get(output))
            if results is None:
                results = [np.zeros((len(ids), *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
            for whole, leaf in zip(results, leaves, strict=True):
                # Later batches are shorter, of tokens too.
                whole[(places, *(slice(n) for n in leaf.shape[1:]))] = leaf[: len(places)]
            bar.update(len(places))

        self._note = bar.set_postfix_str
        call = _Call(function, operands)
        with bar:
            for places, batch in self._batches(call, rows, ids, self._loading(rows, ids, numbers)):
                output = self._executable(call, batch)(operands, batch)
                for leaf in jax.tree.leaves(output):
                    leaf.copy_to_host_async()
                pending.append((places, output))
                if len(pending) > _IN_FLIGHT:
                    collect()
            while pending:
                collect()
        if results is None:
            raise ValueError(f"{description}: a sweep over no rows")
        return jax.tree.unflatten(structure, results)

    def fold(
        self,
        function: FoldFunction,
        total: PyTree,
        operands: PyTree,
        rows: Source,
        ids: Int64[np.ndarray, " n"],
        numbers: Float[np.ndarray, " n"],
        description: str,
    ) -> PyTree:
        """The total of `total = function(operands, (batch, numbers), total)` over the rows `ids`, on the devices.

        Args:
            function: pure. Traced anew only if it is another object.
            total: what it begins with; is used up.
            operands: its arrays, such as parameters.
            rows: where they come from.
            ids: which ones.
            numbers: of each; rows of padding have 0.
            description: for the progress bar.
        """
        load = self._loading(rows, ids, numbers.astype(np.float32))
        bar = tqdm(total=len(ids), desc=description, unit="rows", disable=jax.process_index() > 0, leave=False)
        self._note = bar.set_postfix_str
        with bar:
            for places, batch in self._batches(_Call(function, operands, total), rows, ids, load):
                total = self._executable(_Call(function, operands, total), batch)(operands, batch, total)
                bar.update(len(places))
        return total

    def _loading(self, rows: Source, ids: np.ndarray, numbers: np.ndarray | None) -> Callable[..., PyTree]:
        """What makes a batch of some places in `ids`, filled up to a size, and of their numbers if there are any."""

        def batch(places: np.ndarray, size: int) -> Batch:
            padded = np.full(size, -1, np.int64)
            padded[: len(places)] = ids[places]
            return rows.loader.load(padded)

        def with_numbers(places: np.ndarray, size: int) -> tuple[Batch, jax.Array]:
            padded = np.zeros((size, *numbers.shape[1:]), numbers.dtype)
            padded[: len(places)] = numbers[places]
            sharding = batch_sharding(self.mesh)
            return batch(places, size), jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)

        return batch if numbers is None else with_numbers

    @property
    def device_memory(self) -> int:
        """Bytes that a device has, whatever is in use; the same on every host."""
        if self._memory is not None:
            return self._memory
        statistics = jax.local_devices()[0].memory_stats() or {}
        return _first_hosts(statistics.get("bytes_limit", 4 * _HOST_MEMORY))

    def _batches(self, call: "_Call", rows: Source, ids, load) -> Iterator[tuple[np.ndarray, PyTree]]:
        """(places in `ids`, what `load` makes of them), the next ones being loaded meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            parts = self._parts(call, rows, ids, load)
            upcoming = [pool.submit(load, *part) for part in parts[:1]]
            for number, (places, _) in enumerate(parts):
                self._poll()
                batch = upcoming.pop().result()
                upcoming = [pool.submit(load, *part) for part in parts[number + 1 : number + 2]]
                yield places, batch

    def _parts(self, call: "_Call", rows: Source, ids, load) -> list[tuple[np.ndarray, int]]:
        """The batches: places in `ids` of rows of one length, and how many rows the batch is filled up to."""
        buckets = np.array([bucket_of(int(n), rows.pool.buckets) for n in rows.lengths[ids]])
        parts = []
        for length in sorted(set(buckets.tolist()), reverse=True):
            places = np.flatnonzero(buckets == length)
            size = self._batch_rows(call, rows, places, load, length)
            parts += [(places[first : first + size], size) for first in range(0, len(places), size)]
        return parts

    def _batch_rows(self, call: "_Call", rows: Source, places, load, length: int) -> int:
        """Rows of a batch of this length, a multiple of the number of shards."""
        most = -(-rows.together * -(-len(places) // rows.together) // self._shards)
        if self._rows is not None:
            return self._shards * min(most, -(-self._rows // self._shards))
        key = (*call.kind, tuple(rows.pool.buckets))
        if key not in self._tokens:
            few = min(most, 2)
            batch = load(np.resize(places, few * self._shards), few * self._shards)
            analysis = self._executable(call, batch).memory_analysis()
            used = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            fitting = max(1, int(self._free() / max(used / few, 1) * length))
            # Every host must run the same batches.
            self._tokens[key] = _first_hosts(fitting)
        fit = max(1, min(self._tokens[key] // length, _MOST_ROWS, most))
        return self._shards * (most if fit >= most else 2 ** (fit.bit_length() - 1))

    def _executable(self, call: "_Call", batch):
        leaves, tree = jax.tree.flatten(batch)
        key = (*call.kind, tree, tuple(leaf.shape for leaf in leaves))
        if key not in self._compiled:
            self._note("compiling")
            arguments = (call.operands, batch) if call.total is None else (call.operands, batch, call.total)
            self._compiled[key] = self._jit(call).lower(*arguments).compile()
            self._note("")
        return self._compiled[key]

    def _jit(self, call: "_Call") -> Any:
        if call.total is None:
            return jax.jit(call.function, out_shardings=replicated(self.mesh))
        split = jax.tree.map(lambda leaf: leaf.sharding, call.total)
        return jax.jit(call.function, out_shardings=split, donate_argnums=2)

    def _free(self) -> int:
        if self._memory is not None:
            return self._memory
        statistics = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in statistics:
            return _HOST_MEMORY
        return int(_SHARE * (statistics["bytes_limit"] - statistics["bytes_in_use"]))


def _first_hosts(number: int) -> int:
    """The first host's number, on every host."""
    # In two parts, because of 64 bits JAX would send 32.
    high, low = multihost_utils.broadcast_one_to_all(np.array(divmod(number, 1 << 31), np.int32)).tolist()
    return (high << 31) + low


class _Call(NamedTuple):
    """What is run, with what; `total` is of a fold."""

    function: Callable
    operands: PyTree
    total: PyTree | None = None

    @property
    def kind(self) -> tuple:
        """What it is compiled for, beside the shapes of a batch."""
        leaves, tree = jax.tree.flatten((self.operands, self.total))
        return self.function, tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
