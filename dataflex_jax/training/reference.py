"""The reference model whose token losses DoReMi and Rho-1 compare with, and where they come from.

Cached losses are computed once for each reference, domain and row length, by a sweep that a later run continues where
it was interrupted.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dataflex_jax.data.domains import Domain
from dataflex_jax.data.pool import Pool
from dataflex_jax.data.text.tokenizer import Tokenizer
from dataflex_jax.errors import InputError
from dataflex_jax.files import digest, expanded, keyed_path
from dataflex_jax.models import parts
from dataflex_jax.models.model import Model
from dataflex_jax.policies.base import Reference
from dataflex_jax.signals.sweep import Source, Sweeper
from dataflex_jax.training.fits import check_vocabulary
from dataflex_jax.training.loss_store import LossStore
from dataflex_jax.training.resume import is_imported
from dataflex_jax.training.weights import How, open_model

logger = logging.getLogger(__name__)

OfRow = Callable[[int], Float[np.ndarray, " n"]]


class Cache(NamedTuple):
    """Where losses are kept, and how closely what is there is looked at; see `checksums.fault`."""

    folder: str
    verify: str


def reference_losses(
    reference: Reference | None,
    domains: Sequence[Domain],
    tokenizer: Tokenizer,
    rows: Source,
    sweeper: Sweeper,
    cache: Cache,
    option: str | None,
    how: How | None = None,
) -> tuple[Model | None, dict[str, OfRow]]:
    """What a run with a reference needs: (the model, for the step to run; what the loader adds to each batch).

    Args:
        reference: what the policies want; None: neither.
        domains: the training data.
        tokenizer: of the training data.
        rows: the training rows.
        sweeper: computes losses that are to be cached.
        cache: has the stores of them.
        option: what the user set to the reference, for messages.
        how: what becomes of a reference in Hugging Face's format.

    Raises:
        InputError: the reference cannot be read, or was trained with another tokenizer or other domains.
    """
    if reference is None:
        return None, {}
    model = open_reference(reference, domains, tokenizer, sweeper.mesh, option, how)
    if reference.losses == "model":
        return model, {}
    return None, {"reference_losses": cached_losses(model, domains, rows, sweeper, cache)}


def open_reference(
    reference: Reference,
    domains: Sequence[Domain],
    tokenizer: Tokenizer,
    mesh: Mesh,
    option: str,
    how: How | None = None,
) -> Model:
    """Reads the reference model, of a run or a Hugging Face checkpoint; none of its parameters is trained.

    Raises:
        InputError: it cannot be read, or was trained with another tokenizer or other domains.
    """
    try:
        opened = open_model(reference.path, mesh, option=option, how=how)
    except InputError as error:
        # What else is at fault, such as the weights that the run of the reference started from, keeps its name.
        reason = error.reason if error.option == option else error
        raise InputError(reason, option=option, value=reference.path) from error
    if opened.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            "trained with another tokenizer; both need the same, e.g. "
            f"--config.data.tokenizer={opened.tokenizer_source}",
            option=option,
            value=reference.path,
        )
    check_vocabulary(reference.path, tokenizer, option)
    names = [domain.name for domain in domains]
    if opened.saved is not None and not is_imported(opened.saved) and list(opened.saved["stores"]) != names:
        reason = f"trained on the domains {list(opened.saved['stores'])}, not on {names}"
        raise InputError(reason, option=option, value=reference.path)
    return opened.model.having(opened.model.whole())


def cached_losses(model: Model, domains: Sequence[Domain], rows: Source, sweeper: Sweeper, cache: Cache) -> OfRow:
    """A function from a training row's place in the pool to its token losses, float32; computes what is missing.

    Args:
        model: the reference.
        domains: the training data.
        rows: the training rows.
        sweeper: runs the model over them.
        cache: has the stores.
    """
    fingerprint = parts.fingerprint(model.params)

    def token_losses(model, batch):
        return model.token_losses(batch).losses

    folder, stores = Path(expanded(cache.folder)) / "reference_losses", []
    for number, domain in enumerate(domains):
        first, end = rows.pool.offsets[number : number + 2].tolist()
        key = digest([domain.key, list(domain.train.buckets), fingerprint])
        store = LossStore(keyed_path(folder, domain.name, key), rows.lengths[first:end])

        def compute(begin, stop, first=first, title=f"reference losses of {domain.name}"):
            return sweeper.run(token_losses, model, rows, np.arange(first + begin, first + stop), title)

        store.complete(compute, cache.verify)
        stores.append(store)
    return lambda i: _of_row(rows.pool, stores, i)


def _of_row(pool: Pool, stores: Sequence[LossStore], i: int) -> Float[np.ndarray, " n"]:
    domain = int(pool.domain_of(i))
    return stores[domain].row(i - int(pool.offsets[domain]))
