"""LESS: candidates whose training gradients point where the target set's gradients point.

Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv 2402.04333.
"""

import jax.numpy as jnp

from dataflex_jax.policies.base import Choice, Evidence, Request, Selector
from dataflex_jax.policies.common import ranking
from dataflex_jax.policies.common.influence import GROUP_AGGREGATIONS, check_option, influence, scores
from dataflex_jax.policies.registry import register_selector
from dataflex_jax.policies.signals import TARGETS, Signals


@register_selector("less")
def less(
    *,
    proj_dim: int = 8192,
    projection: str = "sketch",
    gradient_type: str = "adam",
    eps_mode: str = "outside",
    bias_correction: bool = False,
    target_agg: str = "mean_of_cos",
    group_agg: str = "max",
    projection_seed: int = 0,
) -> Selector:
    """Takes the candidates with the highest influence on the target groups (definition 3.1).

    With g the gradient of a candidate's token-mean loss and m, v, b1, b2, eps of the optimizer as it is, a candidate's
    direction is that of `m' / (sqrt(v') + eps)`, `m' = b1 m + (1 - b1) g`, `v' = b2 v + (1 - b2) g^2`; a target's is
    that of its plain gradient. Both are projected by the same random map. A candidate's influence on a group is the
    mean of its cosines with the group's targets, and its score the largest over the groups; over several checkpoints,
    influences are summed with the checkpoints' weights first. A candidate whose direction is zero or not finite scores
    NaN, which is never chosen.

    Args:
        proj_dim: numbers that a gradient is projected to; unused by "none".
        projection: "sketch" (random signs and a sparse hash), "rademacher" (dense random signs, the authors'),
            "kronecker" (from activations and output gradients; gradient_type "sgd" only) or "none" (exact).
        gradient_type: "adam": preconditioned as above; "sgd": the plain gradient.
        eps_mode: "outside": as above; "inside": `m' / sqrt(v' + eps)`, the authors' code. Unused by "sgd".
        bias_correction: whether m' and v' are divided by `1 - b^t`. Unused by "sgd".
        target_agg: "mean_of_cos": as above, the authors' code; "cos_of_mean": the cosine with the group's mean
            gradient, the paper.
        group_agg: "max", or "mean" over the groups.
        projection_seed: of the random map.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    check_option("group_agg", group_agg, GROUP_AGGREGATIONS)
    settings = influence(
        proj_dim=proj_dim,
        projection=projection,
        gradient_type=gradient_type,
        eps_mode=eps_mode,
        bias_correction=bias_correction,
        projection_seed=projection_seed,
        target_agg=target_agg,
    )

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        return Evidence(jnp.asarray(scores(settings, signals, group_agg))), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        return ranking.best(evidence.rows, num)

    return Selector(score=score, choose=choose, needs=frozenset({TARGETS}))
