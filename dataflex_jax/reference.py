"""The reference model whose token losses DoReMi and Rho-1 compare with, and the store of them.

The store is computed once for each reference, domain and row length, by a sweep that a later run continues where it was
interrupted. Losses are 16-bit integers with a scale for each row, so their error is below 1e-5 of the row's greatest.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.checkpoint import Checkpoints, locate
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.hashes import digest
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.models import decoder, lora
from dataflex_jax.policies.base import Reference
from dataflex_jax.records import replace_file
from dataflex_jax.signals.sweep import Source, Sweeper
from dataflex_jax.weights import read_checkpoint

logger = logging.getLogger(__name__)

_LEVELS = 2**16 - 1
_CHUNK = 4096  # rows between two marks of progress


class ReferenceModel(NamedTuple):
    """A trained model to compare with: its static part and parameters."""

    graphdef: nnx.GraphDef
    params: PyTree


def reference_losses(
    reference: Reference | None,
    domains: Sequence[Domain],
    tokenizer: Tokenizer,
    rows: Source,
    sweeper: Sweeper,
    data: ConfigDict,
    mesh: Mesh,
) -> tuple[ReferenceModel | None, dict[str, Callable[[int], Float[np.ndarray, " n"]]]]:
    """What a run with a reference needs: (the model, for the step to run; what the loader adds to each batch).

    Args:
        reference: what the policies want; None: neither.
        domains: the training data.
        tokenizer: of the training data.
        rows: the training rows.
        sweeper: computes losses that are to be cached.
        data: `config.data`.
        mesh: the devices.

    Raises:
        InputError: the reference cannot be read, or was trained with another tokenizer or other domains.
    """
    if reference is None:
        return None, {}
    model = open_reference(reference, domains, tokenizer, mesh)
    if reference.losses == "model":
        return model, {}
    return None, {"reference_losses": cached_losses(model, domains, rows, sweeper, data)}


def open_reference(reference: Reference, domains: Sequence[Domain], tokenizer: Tokenizer, mesh: Mesh) -> ReferenceModel:
    """Reads the reference model from its run.

    Raises:
        InputError: it cannot be read, or was trained with another tokenizer or other domains.
    """
    try:
        run_folder, step = locate(reference.path)
    except InputError as e:
        reason = str(e).removeprefix(f"--checkpoint={Path(reference.path).absolute()}: ")
        raise InputError(f"reference = {str(reference.path)!r}: {reason}") from e
    with Checkpoints(run_folder, writable=False) as checkpoints:
        saved = checkpoints.read_run(step)
        if saved["fields"]["data.tokenizer"] != tokenizer.fingerprint:
            raise InputError(
                f"reference = {str(reference.path)!r}: trained with another tokenizer; both need the same, e.g. "
                f"--config.data.tokenizer={run_folder / 'tokenizer'}"
            )
        names = [domain.name for domain in domains]
        if list(saved["stores"]) != names:
            raise InputError(
                f"reference = {str(reference.path)!r}: trained on the domains {list(saved['stores'])}, not on {names}"
            )
        _, graphdef, params = read_checkpoint(checkpoints, step, configuration.read(run_folder), mesh)
    return ReferenceModel(graphdef, params)


def cached_losses(
    model: ReferenceModel, domains: Sequence[Domain], rows: Source, sweeper: Sweeper, data: ConfigDict
) -> Callable[[int], Float[np.ndarray, " n"]]:
    """A function from a training row's place in the pool to its token losses, float32; computes what is missing.

    Args:
        model: the reference.
        domains: the training data.
        rows: the training rows.
        sweeper: runs the model over them.
        data: `config.data`, whose cache_dir has the stores.
    """
    fingerprint = lora.fingerprint(model.params)

    def token_losses(params, batch):
        return decoder.token_losses(model.graphdef, params, batch["tokens"])[0]

    stores = []
    for number, domain in enumerate(domains):
        first, end = rows.pool.offsets[number : number + 2].tolist()
        key = digest([domain.key, list(domain.train.buckets), fingerprint])
        folder = Path(data.cache_dir).expanduser() / "reference_losses" / f"{domain.name}-{key}"
        store = LossStore(folder, rows.lengths[first:end])
        for begin, stop in store.missing():
            ids = np.arange(first + begin, first + stop)
            losses = sweeper.run(token_losses, model.params, rows, ids, f"reference losses of {domain.name}")
            store.write(begin, losses)
        multihost_utils.sync_global_devices(f"{folder} is complete")
        stores.append(store)
    return lambda i: _of_row(rows.pool, stores, i)


def _of_row(pool: Pool, stores: Sequence["LossStore"], i: int) -> Float[np.ndarray, " n"]:
    domain = int(pool.domain_of(i))
    return stores[domain].row(i - int(pool.offsets[domain]))


class LossStore:
    """The token losses of one domain's rows, memory-mapped.

    Args:
        folder: where the files are; made where it is missing.
        lengths: inputs of each row.
    """

    def __init__(self, folder: Path, lengths: np.ndarray):
        self._progress = folder / "progress.json"
        self._rows = len(lengths)
        self._offsets = np.cumsum([0, *lengths], dtype=np.int64)
        files = (
            (folder / "losses.uint16", np.uint16, int(self._offsets[-1])),
            (folder / "scales.float32", np.float32, self._rows),
        )
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path, dtype, size in files:
                if not path.exists():
                    np.memmap(path, dtype, "w+", shape=(size,)).flush()
        multihost_utils.sync_global_devices(f"{folder} is there")
        mode = "r" if self._done() == self._rows or jax.process_index() > 0 else "r+"
        self._levels, self._scales = (np.memmap(path, dtype, mode, shape=(size,)) for path, dtype, size in files)

    def missing(self):
        """(first, end) of the parts that are still to be written, in order."""
        for first in range(self._done(), self._rows, _CHUNK):
            yield first, min(first + _CHUNK, self._rows)

    def write(self, first: int, losses: Float[np.ndarray, "n T"]) -> None:
        """Writes the losses of the rows from `first` on, and marks them as done."""
        if jax.process_index() == 0:
            for i, row in enumerate(losses, start=first):
                row = row[: self._offsets[i + 1] - self._offsets[i]]
                if not np.isfinite(row).all():
                    raise InputError(f"reference: its losses of row {i} are not finite ({self._progress.parent})")
                self._scales[i] = scale = max(float(row.max()), 1e-30)
                self._levels[self._offsets[i] : self._offsets[i + 1]] = np.rint(row / scale * _LEVELS)
            self._levels.flush()
            self._scales.flush()
            replace_file(self._progress, json.dumps({"rows": first + len(losses)}).encode())

    def row(self, i: int) -> Float[np.ndarray, " n"]:
        """The token losses of row `i` in nats, float32."""
        levels = self._levels[self._offsets[i] : self._offsets[i + 1]].astype(np.float32)
        return levels * (self._scales[i] / _LEVELS)

    def _done(self) -> int:
        return json.loads(self._progress.read_text())["rows"] if self._progress.exists() else 0
