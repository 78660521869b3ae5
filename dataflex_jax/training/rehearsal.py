"""Policies before anything is compiled: what a step will ask of them is traced once, so that a wrong answer is refused.

The functions of `policies` at work check what they return (`policies.contract`); here they are only called.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dataflex_jax.errors import InputError
from dataflex_jax.policies.active import ActivePolicies
from dataflex_jax.policies.base import DrawnRows, Observation, RowGradients, RowObservation
from dataflex_jax.policies.contract import distribution_fault


class Sizes(NamedTuple):
    """Of what a step shows the policies.

    Attributes:
        rows: of a batch.
        weighed: rows that a weighter sees at once.
        tokens: of a row.
        domains: K.
        hidden: width of the hidden states.
    """

    rows: int
    weighed: int
    tokens: int
    domains: int
    hidden: int

    @classmethod
    def of(cls, data: ConfigDict, domains: int, hidden: int) -> "Sizes":
        """Those of `config.data` with K domains and hidden states of a width."""
        parts = data.grad_accumulation if data.weigh_over == "microbatch" else 1
        return cls(data.batch_size, data.batch_size // parts, data.seq_len, domains, hidden)


def rehearse(policies: ActivePolicies, mixer: PyTree, weighters: tuple[PyTree, ...], sizes: Sizes) -> None:
    """Traces the policies' functions that a step calls, with their initial states; computes next to nothing.

    Raises:
        InputError: one of them returns what no step can work with, or raises something.
    """
    _rehearse_mixer(policies, mixer, sizes)
    _rehearse_selector(policies, sizes)
    compared = policies.reference() is not None
    for scheduled, state in zip(policies.weighters, weighters, strict=True):
        policy, shape = scheduled.policy, (sizes.weighed, sizes.tokens)
        embedded = policy.embed and jax.eval_shape(policy.embed, _numbers(*shape, sizes.hidden), _numbers(*shape))
        seen = RowObservation(
            step=_COUNT,
            steps_since_warmup=_COUNT,
            key=_KEY,
            losses=_numbers(sizes.weighed),
            token_losses=_numbers(*shape),
            mask=_numbers(*shape),
            domains=_counts(sizes.weighed),
            embeddings=embedded,
            reference_losses=_numbers(*shape) if compared else None,
            record_numbers=_numbers(*shape) if policy.records else None,
        )
        jax.eval_shape(policy.weigh, state, seen)


def _rehearse_mixer(policies: ActivePolicies, state: PyTree, sizes: Sizes) -> None:
    name, policy = policies.mixer.name, policies.mixer.policy
    weights = np.asarray(policy.sampling_weights(state))
    if fault := distribution_fault(weights):
        raise InputError(
            f"mixer {name!r}: sampling_weights returned {weights.tolist()} of the initial state ({fault}); expected a "
            f"distribution over the {sizes.domains} domains"
        )
    shape = (sizes.rows, sizes.tokens)
    seen = Observation(
        step=_COUNT,
        steps_since_warmup=_COUNT,
        update=_COUNT,
        key=_KEY,
        drawn_with=_numbers(sizes.domains),
        domain_loss=_numbers(sizes.domains),
        domain_rows=_counts(sizes.domains),
        domain_tokens=_numbers(sizes.domains),
        token_losses=_numbers(*shape),
        mask=_numbers(*shape),
        domains=_counts(sizes.rows),
        reference_losses=_numbers(*shape) if policies.reference() is not None else None,
    )
    after = jax.eval_shape(policy.update, state, seen)
    jax.eval_shape(policy.sampling_weights, after)
    if policy.loss_weights is not None:
        jax.eval_shape(policy.loss_weights, after)
    if policy.log is not None:
        policy.log(jax.device_get(state))


def _rehearse_selector(policies: ActivePolicies, sizes: Sizes) -> None:
    """What a selector picks inside the step."""
    if policies.online is None:
        return
    online = policies.online.policy.online
    drawn = online.oversample * sizes.rows
    shape = drawn, sizes.tokens
    gradients = RowGradients(_numbers(drawn, drawn), _numbers(drawn), _numbers())
    seen = DrawnRows(
        step=_COUNT,
        key=_KEY,
        losses=_numbers(drawn),
        token_losses=_numbers(*shape),
        mask=_numbers(*shape),
        domains=_counts(drawn),
        reference_losses=None if online.reference is None else _numbers(*shape),
        gradients=gradients if online.target_rows else None,
    )
    jax.eval_shape(lambda seen: online.pick(seen, sizes.rows), seen)


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _counts(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


_COUNT: Any = _counts()
_KEY: Any = jax.eval_shape(lambda: jax.random.key(0))
