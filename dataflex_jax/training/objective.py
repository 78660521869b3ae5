"""What a step minimises: the policies' weights of a batch's tokens.

Without loss weights the loss is the mean over the batch's tokens. A mixer's loss weights multiply tokens by their
domain (`Mixer.loss_mean` says how they are normalised). With a weighter the loss is `sum_b w_b l_b / B` of the rows'
token-mean losses `l_b`, during its warm-up with ones for weights, so that nothing jumps when it starts. Where another
one chooses tokens, `l_b` is the mean over those, and the B rows are those that have any. The scale of
the loss depends neither on the batch size nor on the number of microbatches or devices.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.policies.base import Mixer, RowObservation, Weighter
from dataflex_jax.policies.schedule import Scheduled

Weighters = tuple[Scheduled[Weighter], ...]
WEIGHT_BOUNDS = ("token_weight_min", "example_weight_min", "example_weight_max")  # metrics that are finite and >= 0
_TINY = 1e-30


class Forward(NamedTuple):
    """By-products of the training forward pass, constants to the gradient; leading axes are the rows'.

    Attributes:
        token_losses: float32 [B, T].
        embeddings: what each weighter's `embed` made of the hidden states, [B, E] or None.
        reference_losses: float32 [B, T], or None.
    """

    token_losses: Float[Array, "B T"]
    embeddings: tuple[Float[Array, "B E"] | None, ...]
    reference_losses: Float[Array, "B T"] | None


class Weights(NamedTuple):
    """Of a batch.

    Attributes:
        tokens: factors of the token losses, whose sum is the loss, [B, T].
        rows: the weighters' weights of the rows, [B]; ones without weighters.
    """

    tokens: Float[Array, "B T"]
    rows: Float[Array, " B"]


def embeds_whole(weighters: Weighters) -> bool:
    """Whether any weighter embeds rows with their last tokens."""
    return any(weighter.policy.embed is not None and weighter.policy.embeds_whole for weighter in weighters)


def embeddings(
    weighters: Weighters, hidden: Float[Array, "B T+1 D"] | Float[Array, "B T D"], batch: Batch
) -> tuple[Float[Array, "B E"] | None, ...]:
    """What each weighter wants of the last hidden states.

    Args:
        weighters: of the run.
        hidden: of the batch's inputs; where `embeds_whole`, of `batch.with_last_inputs()`.
        batch: the rows.
    """
    hidden = jax.lax.stop_gradient(hidden)
    seen = {False: (hidden, batch.real_inputs)}
    if embeds_whole(weighters):
        seen = {
            False: (hidden[:, :-1], batch.real_inputs),
            True: (hidden, batch.with_last_inputs().real_inputs),
        }
    policies = (weighter.policy for weighter in weighters)
    return tuple(None if policy.embed is None else policy.embed(*seen[policy.embeds_whole]) for policy in policies)


def weigh(
    mixer: Mixer,
    weighters: Weighters,
    mixer_state: PyTree,
    weighter_states: tuple[PyTree, ...],
    batch: Batch,
    forward: Forward,
    step: Int[Array, ""],
    key: PRNGKeyArray,
) -> Weights:
    """The weights of a batch (or of a microbatch, as if it were the batch).

    Args:
        mixer: may have loss weights.
        weighters: their weights are multiplied; the product has the product of their means.
        mixer_state: of the mixer.
        weighter_states: of the weighters.
        batch: its mask, domains and number of domains are read.
        forward: of these rows.
        step: number of the step, from 1.
        key: the run's policy key.
    """
    mask, row_tokens = batch.mask, batch.row_tokens
    domains = _domain_weights(mixer, mixer_state, batch, row_tokens)[batch.domain]
    rows, kept = _rows_and_tokens(weighters, weighter_states, batch, forward, step, key)
    if rows is None:
        # The loss is a mean over tokens: over all, or over those that were kept.
        tokens = mask if kept is None else mask * kept
        rows = jnp.sum(tokens, axis=1) / jnp.maximum(row_tokens, 1.0)
        tokens = tokens * domains[:, None]
        if mixer.loss_weights is None or mixer.loss_mean == "tokens":
            tokens = tokens / jnp.maximum(jnp.sum(tokens), _TINY)
        return Weights(jax.lax.stop_gradient(tokens), rows)
    tokens = mask if kept is None else mask * kept
    sums = jnp.sum(tokens, axis=1)
    means = tokens / jnp.maximum(sums, _TINY)[:, None]
    counted, scaled = row_tokens > 0, rows
    if kept is not None:
        # Rows without a kept token are not in the mean, and take none of the weights' sum with them.
        mean, counted = jnp.mean(rows, where=counted), sums > 0
        scaled = rows * mean / jnp.maximum(jnp.mean(rows, where=counted), _TINY)
    factors = scaled * domains / jnp.mean(domains, where=counted) / jnp.sum(counted)
    return Weights(jax.lax.stop_gradient(factors[:, None] * means), rows)


def _domain_weights(mixer: Mixer, state: PyTree, batch: Batch, row_tokens: Float[Array, " B"]) -> Float[Array, " K"]:
    """The weight of each domain's tokens."""
    num_domains = batch.drawn_with.shape[0]
    if mixer.loss_weights is None:
        return jnp.ones(num_domains)
    weights = mixer.loss_weights(state)
    if mixer.loss_mean == "tokens":
        return weights
    member = batch.domain[:, None] == jnp.arange(num_domains)
    return weights / jnp.maximum(jnp.sum(member * row_tokens[:, None], axis=0), 1.0)


def _rows_and_tokens(weighters, states, batch, forward, step, key):
    """The weighters' weights of the rows [B] and of the tokens [B, T]; None where no weighter gives such."""
    mask, rows, kept = batch.mask, [], []
    losses = jnp.sum(mask * forward.token_losses, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
    for scheduled, state, embedded in zip(weighters, states, forward.embeddings, strict=True):
        seen = RowObservation(
            step=step,
            steps_since_warmup=step - scheduled.schedule.warmup_step,
            key=key,
            losses=losses,
            token_losses=forward.token_losses,
            mask=mask,
            domains=batch.domain,
            embeddings=embedded,
            reference_losses=forward.reference_losses,
            record_numbers=batch.record_numbers,
        )
        weights = jnp.where(scheduled.schedule.active(step), scheduled.policy.weigh(state, seen), 1.0)
        (rows if weights.ndim == 1 else kept).append(weights)
    product = math.prod(rows) if rows else None
    if len(rows) > 1:
        counted = jnp.any(mask > 0, axis=1)
        means = [jnp.mean(w, where=counted) for w in (product, *rows)]
        product = product / jnp.maximum(means[0], _TINY) * math.prod(means[1:])
    return product, math.prod(kept) if kept else None


def statistics(rows: Float[Array, " B"]) -> dict[str, Float[Array, ""]]:
    """Least, greatest and mean weight, and the effective sample size `(sum w)^2 / sum w^2` (Kish), of B rows."""
    return {
        "example_weight_min": jnp.min(rows),
        "example_weight_max": jnp.max(rows),
        "example_weight_mean": jnp.mean(rows),
        "effective_sample_size": jnp.square(jnp.sum(rows)) / jnp.maximum(jnp.sum(jnp.square(rows)), 1e-30),
    }
