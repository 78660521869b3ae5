"""The protocols that policies follow.

A policy is a small set of pure functions over a state pytree, in the manner of an optax transformation: a factory takes
the hyperparameters and returns a NamedTuple of functions. The train step calls them inside its one jitted function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, PRNGKeyArray

PyTree = Any


class Observation(NamedTuple):
    """What a policy sees of one optimizer step: by-products of the training forward pass over the global batch.

    B rows, T tokens a row, K domains. All statistics are float32 and cover every device, host and microbatch.

    Attributes:
        step: optimizer steps done, this one included (the first observation has step 1).
        steps_since_warmup: `step` minus the schedule's `warmup_step`; <= 0 during the warm-up.
        update: number, from 0, of the last scheduled update at or before this step; -1 during the warm-up.
        key: the run's policy key, the same at every step (fold the step or the update number in).
        drawn_with: the proportions that this batch was drawn with, a distribution over the domains.
        domain_loss: token-mean training loss of each domain's rows in nats; 0 where the domain has no row.
        domain_rows: rows of each domain in the batch.
        domain_tokens: tokens of each domain that count in the loss.
        token_losses: next-token cross-entropy in nats.
        mask: 1 where a token counts in the loss.
        domains: domain index of each row.
    """

    step: Int[Array, ""]
    steps_since_warmup: Int[Array, ""]
    update: Int[Array, ""]
    key: PRNGKeyArray
    drawn_with: Float[Array, " K"]
    domain_loss: Float[Array, " K"]
    domain_rows: Int[Array, " K"]
    domain_tokens: Float[Array, " K"]
    token_losses: Float[Array, "B T"]
    mask: Float[Array, "B T"]
    domains: Int[Array, " B"]


class Mixer(NamedTuple):
    """Decides from which domain the next rows come.

    Attributes:
        init: initial proportions [K] (a distribution) -> state.
        update: (state, Observation) -> state; runs after every optimizer step, warm-up included.
        sampling_weights: state -> [K], the distribution that the loader draws from once the schedule publishes it.
        loss_weights: state -> [K], the weight of each domain's tokens in the loss (normalised over the batch's tokens,
            constants to the gradient); None for ones.
        on_resume: (old state, fresh state) -> state, called where a run resumes with other proportions or further
            domains. Leaves of the old state whose leading axis is K arrive aligned with the new domains, with the fresh
            state's values where a domain is new. None: the fresh state.
        needs: names of the signals wanted beyond the Observation.
    """

    init: Callable[[Float[Array, " K"]], PyTree]
    update: Callable[[PyTree, Observation], PyTree]
    sampling_weights: Callable[[PyTree], Float[Array, " K"]]
    loss_weights: Callable[[PyTree], Float[Array, " K"]] | None = None
    on_resume: Callable[[PyTree, PyTree], PyTree] | None = None
    needs: frozenset[str] = frozenset()
