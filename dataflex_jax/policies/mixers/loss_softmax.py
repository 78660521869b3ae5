"""Sampling by a softmax over the domains' training losses, the simplest mixer that looks at the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dataflex_jax.policies import Mixer, Observation, options, register_mixer


class LossSoftmaxState(NamedTuple):
    """What the domains' losses were.

    Attributes:
        loss: float32 [K], moving average of each domain's loss in nats; 0 before it is seen.
        seen: whether the domain ever had a row.
        weights: float32 [K], the policy after the last step; initial proportions before any.
    """

    loss: Float[Array, " K"]
    seen: Bool[Array, " K"]
    weights: Float[Array, " K"]


@register_mixer("loss_softmax")
def loss_softmax(*, temperature: float = 1.0, smoothing: float = 0.0) -> Mixer:
    """Samples with `w = softmax(loss / temperature)`, the higher a domain's loss the more often.

    Each optimizer step, the domains with rows in the batch update `loss_i <- smoothing loss_i + (1 - smoothing) l_i`
    with their token-mean loss `l_i` (the first one is taken as it is); the others keep theirs. A domain that has never
    been seen counts as one of the mean loss of those that have.

    Args:
        temperature: in nats, > 0; the smaller, the more the weights differ.
        smoothing: share of the old loss in the average, in [0, 1); 0: the last loss. The fewer rows of a domain a batch
            has, the noisier its loss and the more smoothing it wants.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.positive("temperature", temperature)
    options.between("smoothing", smoothing, 0, 1, open_high=True)

    def init(proportions: Float[Array, " K"]) -> LossSoftmaxState:
        weights = jnp.asarray(proportions, jnp.float32)
        return LossSoftmaxState(jnp.zeros_like(weights), jnp.zeros(weights.shape, bool), weights)

    def update(state: LossSoftmaxState, observation: Observation) -> LossSoftmaxState:
        present = observation.domain_rows > 0
        smoothed = smoothing * state.loss + (1 - smoothing) * observation.domain_loss
        loss = jnp.where(present, jnp.where(state.seen, smoothed, observation.domain_loss), state.loss)
        seen = state.seen | present
        typical = jnp.sum(loss * seen) / jnp.sum(seen)
        return LossSoftmaxState(loss, seen, jax.nn.softmax(jnp.where(seen, loss, typical) / temperature))

    def on_resume(old: LossSoftmaxState, fresh: LossSoftmaxState) -> LossSoftmaxState:
        weights = jnp.where(jnp.any(old.seen), old.weights, fresh.weights)
        return old._replace(weights=weights / jnp.sum(weights))

    return Mixer(init=init, update=update, sampling_weights=lambda state: state.weights, on_resume=on_resume)
