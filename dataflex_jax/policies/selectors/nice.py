"""NICE: LESS against a reward of sampled responses, which need not be differentiable.

Wang et al. 2025, "NICE Data Selection for Instruction Tuning in LLMs with Non-differentiable Evaluation Metric".
"""

import logging

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.policies import (
    Choice,
    Evidence,
    Generations,
    Request,
    Selector,
    Signals,
    options,
    register_selector,
)
from dataflex_jax.policies.common import influence, ranking, reinforce
from dataflex_jax.policies.common.influence import InfluenceOptions
from dataflex_jax.policies.common.rewards import reward as reward_named

logger = logging.getLogger(__name__)


@register_selector("nice")
@options.including(InfluenceOptions)
def nice(
    shared: InfluenceOptions,
    *,
    reward: str = "exact_match",
    pattern: str | None = None,
    mc_samples: int = 4,
    baseline: str = "none",
    temperature: float = 0.7,
    max_new_tokens: int = 512,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Selector:
    """Takes the candidates whose training raises the expected reward on the target groups.

    As `less`, but a target's gradient is not that of its reference's loss. To the target's own prompt the current model
    gives `mc_samples` responses, each gets a reward r, and the gradient is that of `sum_samples r * sum_t log
    p(token_t)` (REINFORCE). A target whose rewards are all 0 (with `baseline`, all equal) says nothing; a group of such
    targets has no say at this update.

    Args:
        shared: the options of `less`.
        reward: "exact_match", "contains", "token_f1", "multiple_choice", "regex", a function "module:function" of
            (prompt, response, reference), or "hf:" and a sequence-classification checkpoint.
        pattern: of "regex".
        mc_samples: responses to each target.
        baseline: "none", or "mean": of each reward the mean of the target's rewards is taken off.
        temperature: of the responses; above 0.
        max_new_tokens: of a response.
        top_k: draw from this many most likely tokens; None: from all.
        top_p: draw from the most likely tokens that have this much probability; None: from all.
    """
    options.between("mc_samples", mc_samples, 1, 4096)
    options.one_of("baseline", baseline, reinforce.BASELINES)
    if baseline == "mean" and mc_samples == 1:
        options.refuse("baseline", baseline, "takes a single response's reward off itself; needs mc_samples >= 2")
    options.between("temperature", temperature, 1e-3, 1e3)
    options.between("max_new_tokens", max_new_tokens, 1, 2**20)
    if top_k is not None:
        options.at_least("top_k", top_k, 1)
    if top_p is not None:
        options.between("top_p", top_p, 0.0, 1.0, open_low=True)
    rewarded, settings = reward_named(reward, pattern), shared.influence()
    generations = Generations(
        mc_samples, max_new_tokens, float(temperature), top_k, None if top_p is None else float(top_p)
    )

    def init(signals: Signals) -> dict:
        rewarded.check(_of_target_set(signals).tasks(), signals)
        return {}

    def of_model(signals: Signals, request: Request) -> tuple[reinforce.Reinforced, Int[np.ndarray, " L"]]:
        """The model's signals with targets by reward, and the groups that have any."""
        responses = signals.respond(generations, request.key)
        rewards = rewarded.rewards(responses.exchanges, signals).reshape(responses.lengths.shape)
        factors = reinforce.factors(rewards, responses.lengths, baseline)
        kept = reinforce.rewarded_groups(factors, signals.targets.groups)
        _say(rewards, signals.targets.group_names, kept)
        return reinforce.reinforced(signals, responses, factors, kept), kept

    def influences(settings: influence.Influence, signals: Signals, request: Request) -> Float[np.ndarray, "N G"]:
        """Of one of several checkpoints; 0 on groups in which it has no reward to go by."""
        of_all = np.zeros((signals.candidates.num_rows, len(signals.targets.group_names)), np.float32)
        model, kept = of_model(signals, request)
        if len(kept):
            of_all[:, kept] = influence.group_influences(settings, model)
        return of_all

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        resolved = settings.for_signals(signals)
        if len(signals.checkpoints) == 1:
            ((weight, checkpoint),) = signals.checkpoints
            model, kept = of_model(checkpoint, request)
            if not len(kept):
                raise _nothing_to_go_by()
            scored = influence.scores(resolved, model, shared.group_agg)
            return Evidence(jnp.asarray(np.float32(weight) * scored)), state
        total = sum(np.float32(w) * influences(resolved, checkpoint, request) for w, checkpoint in signals.checkpoints)
        kept = np.nan_to_num(total, nan=1.0).any(axis=0)
        if not kept.any():
            raise _nothing_to_go_by()
        return Evidence(jnp.asarray(influence.aggregate(total[:, kept], shared.group_agg))), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        return ranking.best(evidence.rows, num)

    return Selector(score=score, choose=choose, init=init, needs=shared.needs())


def _of_target_set(signals: Signals) -> Signals:
    if signals.targets is None:
        raise InputError("selector 'nice' needs a target set whose prompts the model is to answer")
    return signals


def _say(rewards: Float[np.ndarray, "M S"], names: tuple[str, ...], kept: Int[np.ndarray, " L"]) -> None:
    silent = [name for group, name in enumerate(names) if group not in kept]
    without = f"; without any to go by: {', '.join(map(repr, silent))}" if silent else ""
    logger.info(
        "nice: the mean reward of %d responses is %.4g%s.", rewards.size, rewards.mean(dtype=np.float64), without
    )


def _nothing_to_go_by() -> TrainingError:
    return TrainingError(
        "selector 'nice': the rewards of each target's responses are all 0 or all equal, which says nothing about the "
        "candidates; raise mc_samples or temperature, choose a reward with partial credit, or a later warmup_step"
    )
