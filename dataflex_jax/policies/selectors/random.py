"""Uniformly random candidates: the control that shows what a selector's choice is worth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import Choice, Request, Selector, Signals, register_selector


@register_selector("random")
def random() -> Selector:
    """Draws candidates without replacement, anew at each update; asks nothing of the model.

    The draw comes from the update's key alone, so it does not depend on what was trained. All scores are 0.
    """

    def score(state: dict, signals: Signals, request: Request) -> tuple[Float[Array, " n"], dict]:
        return jnp.zeros((signals.num_candidates,), jnp.float32), state

    def choose(evidence: Float[Array, " n"], request: Request, num: int) -> Choice:
        ids = jax.random.permutation(request.key, evidence.shape[0])[:num]
        return Choice(ids=ids, scores=evidence[ids], all_scores=evidence)

    return Selector(score=score, choose=choose)
