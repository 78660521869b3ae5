"""LESS: candidates whose training gradients point where the target set's gradients point.

Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv 2402.04333.
"""

import functools

import jax.numpy as jnp

from dataflex_jax.policies import Choice, Evidence, Request, Selector, Signals, options, register_selector
from dataflex_jax.policies.common import ranking
from dataflex_jax.policies.common.influence import InfluenceOptions, group_influences, scores


@register_selector("less")
@options.including(InfluenceOptions)
def less(shared: InfluenceOptions) -> Selector:
    """Takes the candidates with the highest influence on the target groups (definition 3.1).

    With g the gradient of a candidate's token-mean loss and m, v, b1, b2, eps of the optimizer as it is, a candidate's
    direction is that of `m' / (sqrt(v') + eps)`, `m' = b1 m + (1 - b1) g`, `v' = b2 v + (1 - b2) g^2`; a target's is
    that of its plain gradient. A candidate's influence on a group is the mean of its cosines with the group's targets,
    exact, or where the groups' directions do not fit into the devices' memory, after both were projected by the same
    random map. Its score is the largest over the groups; over several checkpoints, influences are summed with the
    checkpoints' weights first. A candidate whose direction is zero or not finite scores
    NaN, which is never chosen.

    Those are the defaults; `InfluenceOptions` says what else there is.
    """
    settings = shared.influence()

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        return Evidence(jnp.asarray(scores(settings, signals, shared.group_agg))), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        return ranking.best(evidence.rows, num)

    by_group = functools.partial(group_influences, settings)
    return Selector(score=score, choose=choose, needs=shared.needs(), by_group=by_group)
