"""ICONS: target tasks vote for the candidates with the highest influence on them.

Wu et al. 2025, "ICONS: Influence Consensus for Vision-Language Data Selection", arXiv 2501.00654.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dataflex_jax.policies import Choice, Evidence, Request, Selector, Signals, options, register_selector
from dataflex_jax.policies.common.influence import InfluenceOptions, group_influences


@register_selector("icons")
@options.including(InfluenceOptions, without=("target_agg", "group_agg"))
def icons(shared: InfluenceOptions) -> Selector:
    """Takes the candidates with the most votes of target groups.

    Influences are those of `less`, with the mean of cosines. Each group votes for the candidates whose influence on it
    reaches its (1 - num/n) quantile over the n candidates that are chosen from. Candidates with as many votes are
    ranked by their mean influence over the groups, then in incoming order.

    A choice's scores rank as the choice does: the number of votes plus a fraction in [0, 1/2], the place by mean
    influence from the last (0) to the first. Float32 holds this exactly for up to about 10^5 candidates at 60 groups;
    beyond, neighbouring places may share a score.

    The options are those of `less`, but for the aggregations.
    """
    settings = shared.influence()

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        return Evidence(jnp.asarray(group_influences(settings, signals))), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        influences: Float[Array, "n G"] = evidence.rows
        n = influences.shape[0]
        votes = count_votes(influences, num)
        means = jnp.mean(influences, axis=1)
        ids = jnp.lexsort((-means, -votes))[:num]
        places = jnp.zeros((n,), jnp.float32).at[jnp.argsort(-means, stable=True)].set(jnp.arange(n, dtype=jnp.float32))
        all_scores = votes + 0.5 * (n - 1 - places) / max(n - 1, 1)
        return Choice(ids=ids, scores=all_scores[ids], all_scores=all_scores)

    by_group = functools.partial(group_influences, settings)
    return Selector(score=score, choose=choose, needs=shared.needs(), by_group=by_group)


def count_votes(influences: Float[Array, "n G"], num: int) -> Int[Array, " n"]:
    """For how many groups a candidate reaches the (1 - num/n) quantile of the influences on it."""
    # No influence lies between the interpolated quantile and the num-th largest, so that reaching either is the same.
    threshold = jnp.sort(influences, axis=0)[influences.shape[0] - num]
    return jnp.sum(influences >= threshold, axis=1)
