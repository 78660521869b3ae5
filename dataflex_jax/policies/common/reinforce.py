"""Targets whose gradients are those of a reward: REINFORCE on sampled responses, as row sets for influences.

The gradient of a target's expected reward is that of `sum_s r_s log p(response_s)`. Where influences expect the one
of a target's loss, which training is to lower, stands that of the negative: `sum_s r_s n_s grad l_s`, with n_s the
tokens of response s and l_s its token-mean loss. So a candidate whose training raises the reward has a positive
influence.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, PyTree

from dataflex_jax.policies.common import exact
from dataflex_jax.policies.signals import GradientNorms, Gradients, Responses, RowSet, Signals

BASELINES = ("none", "mean")

_SQUARED_AS = 2.0**24  # sums are multiplied by this before they are squared, for float32's digits
_MOST_AT_ONCE = 16  # directions; more are no faster


def factors(
    rewards: Float[np.ndarray, "M S"], lengths: Int[np.ndarray, "M S"], baseline: str
) -> Float[np.ndarray, "M S"]:
    """What each response's token-mean gradient is multiplied by, float64.

    Args:
        rewards: of the responses.
        lengths: their numbers of tokens.
        baseline: "none", or "mean": the mean reward of the target's responses is taken off each.
    """
    rewards = np.asarray(rewards, np.float64)
    if baseline == "mean":
        # Equal ones must leave exactly nothing.
        equal = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
        rewards = np.where(equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    return rewards * lengths


class ReinforcedTargets:
    """M targets, each with the sum of its responses' gradients times `factors` as its gradient.

    It answers what influences ask of targets. A target without any factor has the gradient 0.

    Args:
        responses: S rows a target, side by side.
        factors: of each response.
        groups: of each target; -1: of none.
        group_names: of the groups.
        signals: of the model, which say how many directions fit.
    """

    def __init__(
        self,
        responses: RowSet,
        factors: Float[np.ndarray, "M S"],
        groups: Int[np.ndarray, " M"],
        group_names: Sequence[str],
        signals: Signals,
    ):
        # Influences do not depend on a common scale, and float32 wants one near 1, whatever the rewards'.
        self._factors = factors / max(np.abs(factors).max(), np.finfo(np.float64).tiny)
        self._responses, self._signals = responses, signals
        self.num_rows, self.groups, self.group_names = len(factors), groups, tuple(group_names)

    def sweep(self, signal: Hashable, ids: Int[np.ndarray, " m"] | None = None, operand: PyTree = None) -> PyTree:
        """`GradientNorms` or plain `Gradients` of all targets; see `policies.signals.RowSet`."""
        if ids is not None or operand is not None:
            raise ValueError("reinforced targets are swept as a whole")
        match signal:
            case GradientNorms(parameters):
                return self._norms(parameters)
            case Gradients(_, None, None, _):
                return self._gradients(signal)
        raise ValueError(f"{signal}: nothing that reinforced targets are asked for")

    def gradient_sums(self, weights: Float[np.ndarray, "M G"], parameters: str = "blocks") -> PyTree:
        """See `policies.signals.RowSet`."""
        of_responses = self._factors[:, :, None] * weights[:, None, :]
        flat = of_responses.reshape(-1, weights.shape[1]).astype(np.float32)
        return self._responses.gradient_sums(flat, parameters)

    def _gradients(self, signal: Gradients) -> Float[np.ndarray, "M P"]:
        flat = self._factors.ravel()
        used = np.flatnonzero(flat)
        of_responses = np.asarray(self._responses.sweep(signal, used), np.float64)
        sums = np.zeros((self.num_rows, of_responses.shape[1]))
        np.add.at(sums, used // self._factors.shape[1], flat[used, None] * of_responses)
        return sums.astype(np.float32)

    def _norms(self, parameters: str) -> Float[np.ndarray, " M"]:
        """Of sums, which do not follow from numbers of single responses: each target's sum is made and measured."""
        norms = np.zeros(self.num_rows)
        asked = np.flatnonzero(self._factors.any(axis=1))
        room = max(1, self._signals.room_for_directions(parameters))
        size = min(room, _MOST_AT_ONCE, max(1, len(asked)))
        for start in range(0, len(asked), size):
            block = asked[start : start + size]
            weights = np.zeros((self.num_rows, size))
            weights[block, np.arange(len(block))] = _SQUARED_AS
            norms[block] = np.asarray(exact.lengths_of(self.gradient_sums(weights, parameters)))[: len(block)]
        return norms / _SQUARED_AS


class Reinforced(NamedTuple):
    """Signals of one model as influences ask for them, with targets by reward in place of the target set."""

    candidates: RowSet
    targets: ReinforcedTargets
    model: Signals

    @property
    def checkpoints(self) -> Sequence[tuple[float, "Reinforced"]]:
        """This model alone, with weight 1."""
        return ((1.0, self),)

    def room_for_directions(self, parameters: str = "blocks") -> int:
        """See `policies.signals.Signals`."""
        return self.model.room_for_directions(parameters)


def rewarded_groups(factors: Float[np.ndarray, "M S"], groups: Int[np.ndarray, " M"]) -> Int[np.ndarray, " L"]:
    """The groups in which a reward says something of a response, in order."""
    return np.unique(np.asarray(groups)[factors.any(axis=1)])


def reinforced(
    signals: Signals, responses: Responses, factors: Float[np.ndarray, "M S"], kept: Int[np.ndarray, " L"]
) -> Reinforced:
    """The signals of a model with targets by reward, in some of their groups.

    Args:
        signals: of the model that gave the responses.
        responses: to its targets.
        factors: of each.
        kept: the groups, from `rewarded_groups`.
    """
    groups = np.asarray(signals.targets.groups)
    places = np.where(np.isin(groups, kept), np.searchsorted(kept, groups), -1)
    names = [signals.targets.group_names[group] for group in kept]
    targets = ReinforcedTargets(responses.rows, factors, places, names, signals)
    return Reinforced(signals.candidates, targets, signals)
