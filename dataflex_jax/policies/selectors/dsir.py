"""DSIR: candidates drawn by how much more likely their words are in the targets than in the pool.

Xie et al. 2023, "Data Selection for Language Models via Importance Resampling", arXiv 2302.03169.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.policies import (
    TARGETS,
    TEXTS,
    Choice,
    Evidence,
    Request,
    Selector,
    Signals,
    options,
    register_selector,
)
from dataflex_jax.policies.common import ranking
from dataflex_jax.policies.common.ngrams import Ngrams


class Weighed(NamedTuple):
    """What the choice depends on: the logarithm of each candidate's importance weight; NaN where it has no words."""

    log_weight: Float[Array, " n"]


@register_selector("dsir")
def dsir(*, ngrams: int = 2, buckets: int = 10000) -> Selector:
    """Draws candidates with probabilities in proportion to p(text) / q(text), p of the targets and q of the pool.

    Both are bags of n-grams of words, in lower case, that are hashed into buckets: a text's probability is the product
    of those of its n-grams' buckets, which are how often they occur in the targets' texts, or in the candidates', with
    1 added to each. The weights are computed once, before the first step, without a model; each update is another draw
    without replacement. Their logarithms are sums over a text, so they favour long texts that are like the targets',
    and short ones among those that are not.

    A choice's scores are the logarithms of the weights. Candidates without a word are never chosen.

    Args:
        ngrams: the longest ones; also all shorter ones count.
        buckets: that n-grams are hashed into.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.between("ngrams", ngrams, 1, 8)
    options.at_least("buckets", buckets, 1)

    def init(signals: Signals) -> dict:
        return {"log_weights": log_weights(Ngrams(ngrams, buckets), signals).astype(np.float32)}

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        return Evidence(Weighed(np.asarray(state["log_weights"]))), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        scores = evidence.rows.log_weight
        ids = ranking.drawn(scores, request.key, num)
        return Choice(ids=ids, scores=scores[ids], all_scores=scores)

    return Selector(score=score, choose=choose, init=init, needs=frozenset({TARGETS, TEXTS}))


def log_weights(ngrams: Ngrams, signals: Signals) -> Float[np.ndarray, " N"]:
    """The sum of `log(p_b / q_b)` over the buckets b of each candidate's n-grams, float64; NaN without words.

    Raises:
        InputError: there is no target set, or it has no words.
    """
    if signals.targets is None:
        raise InputError("selector 'dsir' needs a target set to compare the candidates' texts with")
    wanted = ngrams.counts(signals.targets.texts())
    if not wanted.any():
        raise InputError("selector 'dsir': the texts of the targets have no words")
    raw = ngrams.counts(signals.candidates.texts())
    return ngrams.sums(signals.candidates.texts(), _log_shares(wanted) - _log_shares(raw))


def _log_shares(counts: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    return np.log(counts + 1) - np.log(counts.sum() + len(counts))
