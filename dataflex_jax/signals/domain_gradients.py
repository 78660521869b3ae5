"""Inner products of the gradients of whole domains' mean losses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dataflex_jax.data.batch import Batch
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.models.model import Model
from dataflex_jax.policies.signals import DomainGradients
from dataflex_jax.signals.sweep import Source


def domain_gradients(
    model: Model,
    candidates: Source,
    targets: tuple[TargetSet, Source] | None,
    *,
    rows: int,
    random: np.random.Generator,
    learning_rate: float,
) -> DomainGradients:
    """Those of `rows` random rows of each domain, and of the target set.

    Args:
        model: whose gradients.
        candidates: the training rows.
        targets: the target set, and its rows; None: none.
        rows: of each domain.
        random: draws them.
        learning_rate: of the coming step.
    """
    offsets = candidates.pool.offsets
    ids = np.stack([random.integers(low, high, rows) for low, high in itertools.pairwise(offsets)], axis=1)
    batch = candidates.loader.load(ids.reshape(-1))
    target = None
    if targets is not None:
        target_set, target_rows = targets
        target = target_rows.loader.load(target_set.ids[random.integers(0, len(target_set.ids), rows)])
    gram, along = domain_gram(model, _by_domain(batch, len(offsets) - 1), target)
    return DomainGradients(gram, along, np.float32(learning_rate))


@functools.partial(jax.jit, static_argnums=1)
def _by_domain(batch: Batch, num_domains: int) -> Batch:
    """[B * K, ...] with every domain's rows on every device -> [K, B, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_domains, *x.shape[1:]), 0, 1), batch)


@jax.jit
def domain_gram(
    model: Model, batches: Batch, target: Batch | None
) -> tuple[Float[Array, "K K"], Float[Array, " K"] | None]:
    """Inner products of the gradients of K mean losses, and those with a target's.

    Holds K gradients at once, in float32 and split like the parameters.

    Args:
        model: whose gradients.
        batches: of the domains, with a leading axis K.
        target: of the target set; None: none.
    """

    def mean_loss(params: jax.Array, batch: Batch) -> Float[Array, ""]:
        losses = model.with_params(params).token_losses(batch).losses
        return jnp.sum(batch.mask * losses) / jnp.sum(batch.mask)

    gradient = jax.grad(mean_loss)
    each = jax.lax.map(lambda batch: gradient(model.params, batch), batches)

    def products(left, right):
        def leaf(x, y):
            x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
            return jnp.matmul(x, y.T, precision="highest", preferred_element_type=jnp.float32)

        return sum(jax.tree.leaves(jax.tree.map(leaf, left, right)))

    along = None
    if target is not None:
        wanted = jax.tree.map(lambda g: g[None], gradient(model.params, target))
        along = products(each, wanted)[:, 0]
    return products(each, each), along
