"""A selector that asks several others and has what all of them found as evidence, so that one run compares them all."""

import jax.numpy as jnp

from dataflex_jax.policies import TARGETS, TEXTS, Choice, Evidence, Selector, register_selector
from dataflex_jax.policies.common import ranking
from dataflex_jax.policies.selectors.coincide import coincide
from dataflex_jax.policies.selectors.dsir import dsir
from dataflex_jax.policies.selectors.near import near
from dataflex_jax.policies.selectors.rds import rds
from dataflex_jax.policies.selectors.tsds import tsds


@register_selector("several")
def several() -> Selector:
    """Takes what most of them choose, of equally many the first.

    The scores are numbers whose digits say which: 1 coincide, 2 dsir, 4 near, 8 rds, 16 tsds, after those that count.
    """
    asked = {
        "coincide": coincide(num_clusters=6, layers=2),
        "dsir": dsir(buckets=50),
        "near": near(max_k=9),
        "rds": rds(),
        "tsds": tsds(alpha=0.9),
    }

    def init(signals):
        return {name: each.init(signals) for name, each in asked.items() if each.init}

    def score(state, signals, request):
        found = {name: each.score(state.get(name, {}), signals, request)[0] for name, each in asked.items()}
        rows, shared = ({name: getattr(each, part) for name, each in found.items()} for part in ("rows", "shared"))
        return Evidence(rows, shared), state

    def choose(evidence, request, num):
        chosen = []
        for name, each in asked.items():
            alone = Evidence(evidence.rows[name], evidence.shared[name])
            choice = each.choose(alone, request, num)
            chosen.append(jnp.zeros(choice.all_scores.shape[0]).at[choice.ids].set(1.0))
        which = sum(2.0**place * each for place, each in enumerate(chosen))
        found = ranking.best(32 * sum(chosen) + which, num)
        return Choice(found.ids, found.scores, found.all_scores)

    return Selector(score=score, choose=choose, init=init, needs=frozenset({TARGETS, TEXTS}))
