"""Online Data Mixing: an Exp3 bandit over domains whose reward is the training loss.

Albalak et al. 2023, "Efficient Online Data Mixing For Language Model Pre-Training", arXiv 2312.02406.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.policies import Mixer, Observation, options, register_mixer
from dataflex_jax.policies.proportions import Proportions, starting_proportions

VARIANTS = ("official", "paper", "dataflex", "exp3")


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


@register_mixer("odm")
def odm(
    *,
    alpha: float = 0.9,
    variant: str = "official",
    min_exploration_rate: float | None = None,
    reward_scale: float | None = None,
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

    Args:
        alpha: smoothing of the reward, in [0, 1); unused by exp3.
        variant: one of "official", "paper", "dataflex", "exp3".
        min_exploration_rate: least probability of a domain, in [0, 1/K); None: 0 (dataflex: 0.03).
        reward_scale: factor of the reward; None: 1 (dataflex: 15, exp3: 0.1).
        initial_proportions: K weights or "uniform" to start from; None: the run's proportions.

    Raises:
        ValueError: a hyperparameter out of its range; from `init`, a min_exploration_rate of 1/K or more.
    """
    options.one_of("variant", variant, VARIANTS)
    options.between("alpha", alpha, 0, 1, open_high=True)
    if reward_scale is None:
        reward_scale = {"dataflex": 15.0, "exp3": 0.1}.get(variant, 1.0)
    options.positive("reward_scale", reward_scale)
    min_rate = min_exploration_rate
    if min_rate is None:
        min_rate = 0.03 if variant == "dataflex" else 0.0

    def init(natural: Float[Array, " K"]) -> OdmState:
        num_domains = natural.shape[0]
        accepted = f"in [0, 1/K), below {1 / num_domains:.4g} for {num_domains} domains"
        options.require("min_exploration_rate", min_rate, 0 <= min_rate < 1 / num_domains, accepted)
        return OdmState(
            reward=jnp.zeros((num_domains,), jnp.float32),
            weights=starting_proportions("initial_proportions", initial_proportions, natural),
            eps=jnp.float32(1 / num_domains),
            count=jnp.int32(0),
        )

    def rewarded(state: OdmState, observation: Observation) -> Float[Array, " K"]:
        seen = observation.domain_rows > 0
        q = jnp.where(seen, observation.drawn_with, 1.0)
        if variant == "official":
            gain = reward_scale * jnp.exp(observation.domain_loss)
        else:
            gain = reward_scale * observation.domain_loss / q
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

    def update(state: OdmState, observation: Observation) -> OdmState:
        num_domains = state.reward.shape[0]
        t = observation.step if variant == "official" else observation.steps_since_warmup
        decay = jnp.sqrt(math.log(num_domains) / (num_domains * jnp.maximum(t, 1).astype(jnp.float32)))
        eps = jnp.maximum(min_rate, jnp.where(t > 0, jnp.minimum(1 / num_domains, decay), 1 / num_domains))
        reward = rewarded(state, observation)
        weights = (1 - num_domains * eps) * preference(reward, state.eps) + eps
        return OdmState(reward, weights, eps, state.count + 1)

    def on_resume(old: OdmState, fresh: OdmState) -> OdmState:
        weights = jnp.where(old.count > 0, old.weights / jnp.sum(old.weights), fresh.weights)
        return old._replace(weights=weights)

    return Mixer(init=init, update=update, sampling_weights=lambda state: state.weights, on_resume=on_resume)
