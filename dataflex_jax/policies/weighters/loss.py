"""Weights from each row's loss among the losses of its batch.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025,
arXiv 2502.06733.
"""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dataflex_jax.policies import RowObservation, Weighter, options, register_weighter

logger = logging.getLogger(__name__)

STRATEGIES = ("linupper", "quadratic", "extremes", "uniform", "linear")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


@register_weighter("loss")
def loss(
    *,
    strategy: str = "linupper",
    delta: float = 1.0,
    r: float = 1.0,
    r_schedule: str = "constant",
    r_initial: float | None = None,
    r_steps: int | None = None,
    length_weighted: bool = False,
) -> Weighter:
    """Weighs the B rows of a batch by `B softmax(f(h) / r)`, where h is the loss scaled to [-delta, delta].

    Rows without a token in the loss have weight 0 and are not among the B.

    `h_b = delta (2 l_b - (max + min)) / (max - min)` over the whole batch. Where all losses are equal, all weights are.

    * "linupper": `f = min(h + delta, delta)`: rows of low loss count less.
    * "quadratic": `f = 1 - h^2 / delta^2`: rows of medium loss count most.
    * "extremes": `f = |h|`: rows of low and of high loss count most.
    * "uniform": `f = 0`: all rows count the same.
    * "linear": `f = h`: a row counts exponentially in its loss (what the PyTorch peer calls "uniform").

    Args:
        strategy: one of the above.
        delta: half the range of h, > 0.
        r: temperature, > 0; the larger, the more alike the weights.
        r_schedule: how the temperature gets from `r_initial` to `r`, by optax's schedules: "constant" (`r` throughout),
            "linear", "cosine" or "exponential".
        r_initial: the temperature of the first step after the warm-up; only with a schedule.
        r_steps: the number of steps until it is `r`; only with a schedule.
        length_weighted: the authors' code: weights are multiplied by the rows' numbers of tokens, and scaled to mean 1,
            so that "uniform" is the mean over the batch's tokens.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.one_of("strategy", strategy, STRATEGIES)
    options.positive("delta", delta)
    temperature = _temperature(r, r_schedule, r_initial, r_steps)

    def preference(h: Float[Array, " B"]) -> Float[Array, " B"]:
        match strategy:
            case "linupper":
                return jnp.minimum(h + delta, delta)
            case "quadratic":
                return 1 - h**2 / delta**2
            case "extremes":
                return jnp.abs(h)
            case "uniform":
                return jnp.zeros_like(h)
            case _:
                return h

    def weigh(state: tuple, observation: RowObservation) -> Float[Array, " B"]:
        losses = observation.losses.astype(jnp.float32)
        if losses.shape[0] == 1:
            logger.info("Weighter loss: with one row a batch every strategy is the plain loss.")
        tokens = jnp.sum(observation.mask, axis=1)
        counted = tokens > 0
        low = jnp.min(losses, where=counted, initial=jnp.inf)
        high = jnp.max(losses, where=counted, initial=-jnp.inf)
        spread = high - low
        h = delta * (2 * losses - (high + low)) / jnp.where(spread > 0, spread, 1.0)
        scores = jnp.where(spread > 0, preference(h) / temperature(observation.steps_since_warmup - 1), 0.0)
        weights = jax.nn.softmax(scores, where=counted)
        if length_weighted:
            weights = weights * tokens
            weights = weights / jnp.sum(weights)
        return jnp.sum(counted) * weights

    return Weighter(init=lambda width: (), weigh=weigh)


def _temperature(r: float, schedule: str, initial: float | None, steps: int | None) -> Callable[[Array], Array]:
    options.positive("r", r)
    options.one_of("r_schedule", schedule, SCHEDULES)
    if schedule == "constant":
        for option, value in (("r_initial", initial), ("r_steps", steps)):
            options.require(option, value, value is None, f"None but for an r_schedule of {', '.join(SCHEDULES[1:])}")
        return optax.constant_schedule(r)
    options.require("r_initial", initial, initial is not None and initial > 0, f"> 0 for r_schedule = {schedule!r}")
    options.require("r_steps", steps, steps is not None and steps >= 1, f">= 1 for r_schedule = {schedule!r}")
    match schedule:
        case "linear":
            return optax.linear_schedule(initial, r, steps)
        case "cosine":
            return optax.cosine_decay_schedule(initial, steps, alpha=r / initial)
        case _:
            return optax.exponential_decay(initial, steps, decay_rate=r / initial, end_value=r)
