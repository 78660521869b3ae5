"""What a train step would show a policy, from NumPy arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dataflex_jax.policies import Observation, RowObservation

_RECORDED = Path(__file__).parents[3] / "shared" / "reference"


def recorded(name):
    """The PyTorch peer's recorded numbers, where they are at hand."""
    if not (_RECORDED / name).exists():
        pytest.skip(f"the recorded numbers of the peer, {name}, are not here")
    return np.load(_RECORDED / name)


def of_domains(step, loss, rows, warmup=0, drawn_with=None):
    """The observation of a step by its domains' losses and rows."""
    num_domains = len(loss)
    return Observation(
        step=jnp.int32(step),
        steps_since_warmup=jnp.int32(step - warmup),
        update=jnp.int32(max(step - warmup, -1)),
        key=jax.random.key(0),
        drawn_with=jnp.asarray(
            np.full(num_domains, 1 / num_domains) if drawn_with is None else drawn_with, jnp.float32
        ),
        domain_loss=jnp.asarray(loss, jnp.float32),
        domain_rows=jnp.asarray(rows, jnp.int32),
        domain_tokens=jnp.asarray(rows, jnp.float32),
        token_losses=jnp.zeros((1, 1)),
        mask=jnp.ones((1, 1)),
        domains=jnp.zeros((1,), jnp.int32),
    )


def of_tokens(step, token_losses, reference_losses, mask, domains, num_domains, warmup=0):
    """The observation of a step by its tokens' losses; `mask` and `domains` as in Observation."""
    member = np.asarray(domains)[:, None] == np.arange(num_domains)
    tokens = (member * mask.sum(1)[:, None]).sum(0)
    nll = (member * (mask * token_losses).sum(1)[:, None]).sum(0)
    return of_domains(step, nll / np.maximum(tokens, 1), member.sum(0), warmup)._replace(
        domain_tokens=jnp.asarray(tokens, jnp.float32),
        token_losses=jnp.asarray(token_losses, jnp.float32),
        mask=jnp.asarray(mask, jnp.float32),
        domains=jnp.asarray(domains, jnp.int32),
        reference_losses=jnp.asarray(reference_losses, jnp.float32),
    )


def of_rows(
    losses,
    *,
    mask=None,
    token_losses=None,
    embeddings=None,
    reference_losses=None,
    record_numbers=None,
    since_warmup=1,
):
    """What a weighter sees of rows with these losses (of one token each, unless `mask` says otherwise)."""

    def array(values):
        return None if values is None else jnp.asarray(values, jnp.float32)

    losses = array(losses)
    mask = jnp.ones((len(losses), 1)) if mask is None else array(mask)
    return RowObservation(
        step=jnp.int32(since_warmup),
        steps_since_warmup=jnp.int32(since_warmup),
        key=jax.random.key(0),
        losses=losses,
        token_losses=losses[:, None] * mask if token_losses is None else array(token_losses),
        mask=mask,
        domains=jnp.zeros((len(losses),), jnp.int32),
        embeddings=array(embeddings),
        reference_losses=array(reference_losses),
        record_numbers=array(record_numbers),
    )
