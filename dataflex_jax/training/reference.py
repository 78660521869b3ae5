"""The reference model whose token losses DoReMi and Rho-1 compare with, and where they come from.

Cached losses are computed once for each reference, domain and row length, by a sweep that a later run continues where
it was interrupted.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict

from dataflex_jax import config as configuration
from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.files import digest
from dataflex_jax.models import decoder, lora
from dataflex_jax.policies.base import Reference
from dataflex_jax.signals.sweep import Source, Sweeper
from dataflex_jax.training.checkpoint import Checkpoints, locate
from dataflex_jax.training.loss_store import LossStore
from dataflex_jax.training.weights import read_checkpoint

logger = logging.getLogger(__name__)


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
    except InputError as error:
        raise InputError(f"reference = {str(reference.path)!r}: {error.reason}") from error
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


def _of_row(pool: Pool, stores: Sequence[LossStore], i: int) -> Float[np.ndarray, " n"]:
    domain = int(pool.domain_of(i))
    return stores[domain].row(i - int(pool.offsets[domain]))
