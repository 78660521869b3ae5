"""Candidates by how much their loss has fallen, in a window that moves from large falls to small ones."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.policies import Choice, Evidence, Losses, Request, Selector, Signals, options, register_selector
from dataflex_jax.policies.common import ranking

BASELINES = ("first", "warmup")
_OUTSIDE = 0.025
_INSIDE_STRATUM, _OUTSIDE_STRATUM = 0, 1


class Falls(NamedTuple):
    """What the draw depends on, of each candidate.

    Attributes:
        delta: float32 [n], `L0 - L_t`, positive where the loss fell.
        known: float32 [n], 1 where L0 is older than L_t; 0 throughout at the update that measures it.
    """

    delta: Float[Array, " n"]
    known: Float[Array, " n"]


@register_selector("delta_loss")
def delta_loss(*, window_size: float = 0.2, baseline: str = "first", replacement: bool = False) -> Selector:
    """Draws candidates mostly from a window over the falls of their losses since the baseline, the largest fall first.

    At update u of U, over the n candidates sorted by `L0 - L_t` descending, the window of `window_size` w starts at
    `sigmoid(10 (x - 1/2)) (1 - w) n` with `x = (u - 1) / (U - 1)` (1 where U is 1), and ends w n later, both rounded
    down. Its end is cut at the first candidate whose loss rose; a window that is empty then is replaced by the
    w n largest falls. `p ~ 1` inside, 0.025 outside. A choice's scores are p.

    The state is {"baseline": float32 [N], L0, NaN before it is known; "known": bool, whether it is}.

    Args:
        window_size: w, in (0, 1].
        baseline: where L0 comes from: "first": the parameters at the first step of training; "warmup", as in the
            PyTorch peer: those at the first update, whose draw is uniform therefore.
        replacement: whether a candidate may be drawn several times.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.between("window_size", window_size, 0, 1, open_low=True)
    options.one_of("baseline", baseline, BASELINES)

    def init(signals: Signals) -> dict[str, Array]:
        if baseline == "first":
            losses, known = jnp.asarray(signals.candidates.sweep(Losses()), jnp.float32), True
        else:
            losses, known = jnp.full((signals.candidates.num_rows,), jnp.nan, jnp.float32), False
        return {"baseline": losses, "known": jnp.asarray(known)}

    def score(state: dict[str, Array], signals: Signals, request: Request) -> tuple[Evidence, dict[str, Array]]:
        losses = jnp.asarray(signals.candidates.sweep(Losses()), jnp.float32)
        before = jnp.where(state["known"], state["baseline"], losses)
        known = jnp.broadcast_to(state["known"].astype(jnp.float32), losses.shape)
        return Evidence(Falls(before - losses, known)), {"baseline": before, "known": jnp.asarray(True)}

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        falls = evidence.rows
        inside = in_window(falls.delta, request.update, request.updates, window_size)
        stratum = jnp.where(inside | (falls.known == 0), _INSIDE_STRATUM, _OUTSIDE_STRATUM)
        log_weights = jnp.asarray([0.0, math.log(_OUTSIDE)])
        return ranking.draw(stratum, log_weights, request.key, num, replacement=replacement)

    return Selector(score=score, choose=choose, init=init, replacement=replacement)


def window(
    update: Int[Array, ""], updates: Int[Array, ""], n: int, window_size: float
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first place of the window and the one after its last, before they are cut; see `delta_loss`."""
    # In float32 places would be off by one in pools of a million.
    with jax.enable_x64(True):
        done, all_of_them = jnp.asarray(update - 1, jnp.float64), jnp.asarray(updates - 1, jnp.float64)
        x = jnp.where(all_of_them > 0, done / jnp.maximum(all_of_them, 1), 1.0)
        start = 1 / (1 + jnp.exp(-10 * (x - 0.5))) * (1 - window_size) * n
        return start.astype(jnp.int32), (start + window_size * n).astype(jnp.int32)


def in_window(
    delta: Float[Array, " n"], update: Int[Array, ""], updates: Int[Array, ""], window_size: float
) -> Bool[Array, " n"]:
    """Whether each candidate is in the window, after cuts and fallback; see `delta_loss`."""
    n = delta.shape[0]
    start, end = window(update, updates, n, window_size)
    end = jnp.minimum(end, jnp.sum(delta >= 0))
    empty = start >= end
    start, end = jnp.where(empty, 0, start), jnp.where(empty, max(1, int(window_size * n)), end)
    place = jnp.zeros((n,), jnp.int32).at[ranking.top(delta, n)].set(jnp.arange(n, dtype=jnp.int32))
    return (start <= place) & (place < end)
