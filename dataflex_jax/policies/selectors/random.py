"""Uniformly random candidates: the control that shows what a selector's choice is worth."""

import jax
import jax.numpy as jnp

from dataflex_jax.policies import Choice, Evidence, Request, Selector, Signals, register_selector


@register_selector("random")
def random() -> Selector:
    """Draws candidates without replacement, anew at each update; asks nothing of the model.

    The draw comes from the update's key alone, so it does not depend on what was trained. All scores are 0.
    """

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        return Evidence(jnp.zeros((signals.candidates.num_rows,), jnp.float32)), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        zeros = evidence.rows
        ids = jax.random.permutation(request.key, zeros.shape[0])[:num]
        return Choice(ids=ids, scores=zeros[ids], all_scores=zeros)

    return Selector(score=score, choose=choose)
