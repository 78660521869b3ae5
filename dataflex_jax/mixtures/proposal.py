"""The mixture that a law proposes.

    min over w of mean_m exp(A_m . w) + KL_WEIGHT * KL(w | prior),   w on the simplex,   w_i <= cap_i

which is convex.
"""

import numpy as np
from jaxtyping import Bool, Float64
from scipy.special import rel_entr

from dataflex_jax.errors import InputError
from dataflex_jax.mixtures.law import Law

KL_WEIGHT = 0.05
EPOCHS = 4  # of a domain's tokens, at most
_BARRIERS = tuple(10.0**-power for power in range(2, 13))
_MOST_STEPS = 200  # of Newton's method, a barrier
_STILL = 1e-10


def caps(tokens: Float64[np.ndarray, " K"], target_tokens: float | None) -> Float64[np.ndarray, " K"]:
    """The largest weight of each domain: `EPOCHS` epochs of its tokens.

    Args:
        tokens: that each domain has.
        target_tokens: that the model will be trained on; None: no limits.

    Raises:
        InputError: all domains together do not have as many.
    """
    if target_tokens is None:
        return np.ones(len(tokens))
    most = EPOCHS * tokens / target_tokens
    if most.sum() < 1:
        reason = f"the domains have {tokens.sum():.6g} tokens, and each is taken {EPOCHS} times at most; lower it"
        raise InputError(reason, option="--target_tokens", value=f"{target_tokens:.6g}")
    return np.minimum(most, 1.0)


def propose(
    law: Law,
    prior: Float64[np.ndarray, " K"],
    most: Float64[np.ndarray, " K"] | None = None,
    counted: Bool[np.ndarray, " M"] | None = None,
) -> Float64[np.ndarray, " K"]:
    """The mixture that the law says is best, near the prior.

    Args:
        law: of the metrics, of which less is better.
        prior: a distribution; a domain that has 0 in it keeps 0.
        most: the largest weight of each domain; None: 1.
        counted: which metrics move it; the others count as if they were the same everywhere. None: all.

    Raises:
        InputError: the domains that the prior has may not fill a mixture.
    """
    there = prior > 0
    limits = (np.ones(len(prior)) if most is None else most)[there]
    if limits.sum() < 1:
        raise InputError("the domains that the prior has may not fill a mixture; lower --target_tokens")
    share = np.ones(len(law.floors)) if counted is None else counted.astype(np.float64)
    weights = np.zeros(len(prior))
    weights[there] = _minimum(law.slopes[:, there], share / len(share), prior[there], limits)
    return weights


def objective(law: Law, weights: Float64[np.ndarray, " K"], prior: Float64[np.ndarray, " K"]) -> float:
    """What `propose` minimises, of all metrics."""
    return float(np.exp(law.slopes @ weights).mean() + KL_WEIGHT * rel_entr(weights, prior).sum())


def _minimum(
    slopes: Float64[np.ndarray, "M K"],
    shares: Float64[np.ndarray, " M"],
    prior: Float64[np.ndarray, " K"],
    most: Float64[np.ndarray, " K"],
) -> Float64[np.ndarray, " K"]:
    """Newton's method on the simplex, with a barrier before `most` that is lowered to nothing."""
    weights = most / most.sum()
    if most.sum() < 1 + _STILL:
        return weights

    def value(w: np.ndarray, barrier: float) -> float:
        return shares @ np.exp(slopes @ w) + KL_WEIGHT * rel_entr(w, prior).sum() - barrier * np.log(most - w).sum()

    for barrier in _BARRIERS:
        for _ in range(_MOST_STEPS):
            rises, room = shares * np.exp(slopes @ weights), most - weights
            gradient = rises @ slopes + KL_WEIGHT * np.log(weights / prior) + barrier / room
            curvature = (slopes.T * rises) @ slopes + np.diag(KL_WEIGHT / weights + barrier / room**2)
            down, even = np.linalg.solve(curvature, np.stack([-gradient, np.ones_like(weights)], axis=1)).T
            step = down - even * (down.sum() / even.sum())  # whose sum is 0
            fall = -gradient @ step
            if fall < _STILL**2:
                break
            inside = np.concatenate([-weights[step < 0] / step[step < 0], room[step > 0] / step[step > 0]])
            length, before = min(1.0, 0.95 * inside.min()), value(weights, barrier)
            while value(weights + length * step, barrier) > before - 0.1 * length * fall and length > _STILL:
                length /= 2
            weights = weights + length * step
            if length <= _STILL:
                break
    return weights / weights.sum()
