"""Online Data Mixing: an Exp3 bandit over domains whose reward is the training loss.

Albalak et al. 2023, "Efficient Online Data Mixing For Language Model Pre-Training", arXiv 2312.02406.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.policies import HELD_OUT, Losses, Mixer, Observation, Signals, options, register_mixer
from dataflex_jax.policies.proportions import Proportions, starting_proportions

VARIANTS = ("official", "paper", "dataflex", "exp3")
REWARDS = ("training", "validation")


class OdmState(NamedTuple):
    """The bandit's memory.

    Attributes:
        reward: float32 [K], moving average (exp3: sum) of each domain's rewards, 0 before the first.
        weights: float32 [K], the policy after the last update.
        eps: exploration rate of the last update, the least probability of any domain.
        count: updates so far.
    """

    reward: Float[Array, " K"]
    weights: Float[Array, " K"]
    eps: Float[Array, ""]
    count: Int[Array, ""]


class ValidatedState(NamedTuple):
    """The bandit's memory where held-out losses reward it.

    Attributes:
        reward: as in `OdmState`.
        weights: as in `OdmState`.
        eps: as in `OdmState`.
        count: as in `OdmState`.
        held_out: float32 [K], each domain's held-out loss at the last update.
        measured: bool [K], whether it is known; before the first update it is not.
        fall: float32 [K], by how much it had fallen by then since the update before; 0 at the first.
        due: whether the fall has not rewarded anything yet.
    """

    reward: Float[Array, " K"]
    weights: Float[Array, " K"]
    eps: Float[Array, ""]
    count: Int[Array, ""]
    held_out: Float[Array, " K"]
    measured: Bool[Array, " K"]
    fall: Float[Array, " K"]
    due: Bool[Array, ""]


@register_mixer("odm")
def odm(
    *,
    alpha: float = 0.9,
    variant: str = "official",
    min_exploration_rate: float | None = None,
    reward_scale: float | None = None,
    reward: str = "training",
    initial_proportions: Proportions = None,
) -> Mixer:
    """Samples a domain more often the higher its recent training loss.

    Each optimizer step, the domains i that have rows in the batch are rewarded with their token-mean loss `l_i`; `q_i`
    is the proportion that the batch was drawn with. The exploration rate is
    `eps_t = max(min_exploration_rate, min(1/K, sqrt(ln K / (K t))))`.

    * "official", the authors' SmoothedMeanWeightUpdater.group_update, t counted from the start of the run:
      `reward_i <- alpha reward_i + (1-alpha) exp(l_i)`, `w_i = (1 - K eps_t) reward_i / sum(reward) + eps_t`.
    * "paper", algorithm 1, t counted from the end of the warm-up (1/K before):
      `reward_i <- alpha reward_i + (1-alpha) l_i / q_i`, `w_i = (1 - K eps_t) softmax(eps_{t-1} reward)_i + eps_t`.
    * "dataflex", the PyTorch peer: paper with `reward_scale` (15) times the reward, rewards clipped to +-1e4, logits
      shifted by their maximum and clipped to [-5, 0], min_exploration_rate 0.03.
    * "exp3": cumulative `reward_i <- reward_i + (l_i / 10) / q_i`, policy as in "paper".

    With reward="validation" the domains are rewarded for what they learn: once at each scheduled update, `l_i` being
    the fall of each domain's held-out loss (the mean of its rows' token-mean losses, at most `config.eval_rows` rows)
    since the update before, times reward_scale (official: within the exponential). Until then the policy stays.

    Args:
        alpha: smoothing of the reward, in [0, 1); unused by exp3.
        variant: one of "official", "paper", "dataflex", "exp3".
        min_exploration_rate: least probability of a domain, in [0, 1/K); None: 0 (dataflex: 0.03).
        reward_scale: factor of the reward; None: 1 (dataflex: 15, exp3: 0.1).
        reward: "training": by the training loss; "validation": by the fall of the held-out losses, which are small
            numbers (raise reward_scale).
        initial_proportions: K weights or "uniform" to start from; None: the run's proportions.

    Raises:
        ValueError: a hyperparameter out of its range; from `init`, a min_exploration_rate of 1/K or more.
    """
    options.one_of("variant", variant, VARIANTS)
    options.one_of("reward", reward, REWARDS)
    options.between("alpha", alpha, 0, 1, open_high=True)
    if reward_scale is None:
        reward_scale = {"dataflex": 15.0, "exp3": 0.1}.get(variant, 1.0)
    options.positive("reward_scale", reward_scale)
    min_rate = min_exploration_rate
    if min_rate is None:
        min_rate = 0.03 if variant == "dataflex" else 0.0

    def init(natural: Float[Array, " K"]) -> OdmState | ValidatedState:
        num_domains = natural.shape[0]
        accepted = f"in [0, 1/K), below {1 / num_domains:.4g} for {num_domains} domains"
        options.require("min_exploration_rate", min_rate, 0 <= min_rate < 1 / num_domains, accepted)
        bandit = OdmState(
            reward=jnp.zeros((num_domains,), jnp.float32),
            weights=starting_proportions("initial_proportions", initial_proportions, natural),
            eps=jnp.float32(1 / num_domains),
            count=jnp.int32(0),
        )
        if reward == "training":
            return bandit
        zeros = jnp.zeros(num_domains, jnp.float32)
        return ValidatedState(*bandit, zeros, jnp.zeros(num_domains, bool), zeros, jnp.bool_(False))

    def rewarded(state: OdmState | ValidatedState, observation: Observation) -> Float[Array, " K"]:
        if reward == "training":
            loss, seen = observation.domain_loss, observation.domain_rows > 0
        else:
            loss, seen = state.fall, observation.drawn_with > 0
        q = jnp.where(seen, observation.drawn_with, 1.0)
        if variant != "official":
            gain = reward_scale * loss / q
        else:
            gain = reward_scale * jnp.exp(loss) if reward == "training" else jnp.exp(reward_scale * loss)
        smoothed = state.reward + gain if variant == "exp3" else alpha * state.reward + (1 - alpha) * gain
        if variant == "dataflex":
            smoothed = jnp.clip(smoothed, -1e4, 1e4)
        return jnp.where(seen, smoothed, state.reward)

    def preference(reward: Float[Array, " K"], last_eps: Float[Array, ""]) -> Float[Array, " K"]:
        if variant == "official":
            return reward / jnp.sum(reward)
        logits = last_eps * reward
        if variant == "dataflex":
            logits = jnp.clip(logits - jnp.max(logits), -5.0, 0.0)
        return jax.nn.softmax(logits)

    def update(state: OdmState | ValidatedState, observation: Observation) -> OdmState | ValidatedState:
        num_domains = state.reward.shape[0]
        t = observation.step if variant == "official" else observation.steps_since_warmup
        decay = jnp.sqrt(math.log(num_domains) / (num_domains * jnp.maximum(t, 1).astype(jnp.float32)))
        eps = jnp.maximum(min_rate, jnp.where(t > 0, jnp.minimum(1 / num_domains, decay), 1 / num_domains))
        rewards = rewarded(state, observation)
        weights = (1 - num_domains * eps) * preference(rewards, state.eps) + eps
        return state._replace(reward=rewards, weights=weights, eps=eps, count=state.count + 1)

    def update_if_due(state: ValidatedState, observation: Observation) -> ValidatedState:
        updated = update(state, observation)._replace(due=jnp.bool_(False))
        return jax.tree.map(lambda new, old: jnp.where(state.due, new, old), updated, state)

    def refresh(state: ValidatedState, signals: Signals) -> ValidatedState:
        losses, rows = signals.held_out.sweep(Losses()), signals.held_out
        held_out = jnp.asarray(_means(losses, rows.groups, len(rows.group_names)))
        fall = jnp.where(state.measured, state.held_out - held_out, 0.0)
        return state._replace(held_out=held_out, measured=jnp.ones_like(state.measured), fall=fall, due=jnp.bool_(True))

    def on_resume(old: OdmState | ValidatedState, fresh: OdmState | ValidatedState) -> OdmState | ValidatedState:
        weights = jnp.where(old.count > 0, old.weights / jnp.sum(old.weights), fresh.weights)
        return old._replace(weights=weights)

    mixer = Mixer(init=init, update=update, sampling_weights=lambda state: state.weights, on_resume=on_resume)
    if reward == "training":
        return mixer
    return mixer._replace(update=update_if_due, refresh=refresh, needs=frozenset({HELD_OUT}))


def _means(losses: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"], number: int) -> Float[np.ndarray, " K"]:
    """Of each group's losses; rows without a token in the loss, which have none, aside. 0 where no row has one."""
    known = np.isfinite(losses)
    sums = np.bincount(groups[known], losses[known].astype(np.float64), number)
    return (sums / np.maximum(np.bincount(groups[known], minlength=number), 1)).astype(np.float32)
