"""Candidates of high, medium or low loss more often than the others."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.policies import Choice, Evidence, Losses, Request, Selector, Signals, options, register_selector
from dataflex_jax.policies.common import ranking

BANDS = ("low", "medium", "high")
_NOT_FINITE = len(BANDS)


@register_selector("loss")
def loss(
    *,
    focus: str = "high",
    quantiles: tuple[float, float] = (0.33, 0.66),
    focus_weight: float = 5.0,
    temperature: float = 1.0,
    replacement: bool = False,
) -> Selector:
    """Draws candidates by their current loss, those in one band `focus_weight` times as often as any other.

    With q1 <= q2 the `quantiles` of the finite losses, low <= q1 < medium <= q2 < high. Each candidate is drawn with
    probability `p ~ weight^(1 / temperature)`, weight being `focus_weight` in the band `focus` and 1 elsewhere; p is 0
    where the loss is not finite. A choice's scores are p.

    Args:
        focus: "low", "medium" or "high".
        quantiles: the two borders between the bands, in [0, 1].
        focus_weight: weight inside the band, > 0.
        temperature: > 0; below 1 sharpens, above 1 flattens.
        replacement: whether a candidate may be drawn several times.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.one_of("focus", focus, BANDS)
    ascending = len(quantiles) == 2 and 0 <= quantiles[0] <= quantiles[1] <= 1
    options.require("quantiles", quantiles, ascending, "two numbers in [0, 1], the lower first")
    options.between("focus_weight", focus_weight, 0, math.inf, open_low=True, open_high=True)
    options.positive("temperature", temperature)

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        return Evidence(jnp.asarray(signals.candidates.sweep(Losses()), jnp.float32)), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        log_weights = band_log_weights(focus, focus_weight, temperature)
        return ranking.draw(bands(evidence.rows, quantiles), log_weights, request.key, num, replacement=replacement)

    return Selector(score=score, choose=choose, replacement=replacement)


def bands(losses: Float[Array, " n"], quantiles: tuple[float, float]) -> Int[Array, " n"]:
    """The band of each loss: 0 low, 1 medium, 2 high, 3 not finite."""
    finite = jnp.isfinite(losses)
    q1, q2 = jnp.nanquantile(jnp.where(finite, losses, jnp.nan), jnp.asarray(quantiles, jnp.float32))
    return jnp.where(finite, (losses > q1).astype(jnp.int32) + (losses > q2), _NOT_FINITE)


def band_log_weights(focus: str, focus_weight: float, temperature: float) -> Float[Array, "4"]:
    """The logarithm of `weight^(1 / temperature)` in each band; -inf where losses are not finite."""
    return jnp.asarray([math.log(focus_weight) / temperature * (band == focus) for band in BANDS] + [-math.inf])


def probabilities(
    losses: Float[Array, " n"],
    *,
    focus: str = "high",
    quantiles: tuple[float, float] = (0.33, 0.66),
    focus_weight: float = 5.0,
    temperature: float = 1.0,
) -> Float[Array, " n"]:
    """The probability of each candidate in a first draw; exactly 0 where the loss is not finite. See `loss`."""
    return ranking.probabilities(bands(losses, quantiles), band_log_weights(focus, focus_weight, temperature))
