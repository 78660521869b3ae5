"""RDS+: candidates whose hidden states are like the targets', each target choosing in turn.

Ivison et al. 2025, "Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dataflex_jax.errors import InputError
from dataflex_jax.policies import (
    Choice,
    Embeddings,
    Evidence,
    FixedEmbeddings,
    Request,
    Selector,
    Signals,
    options,
    register_selector,
)
from dataflex_jax.policies.common.anchors import TOKENS
from dataflex_jax.policies.common.embedded import EmbeddingOptions, needs, similarities
from dataflex_jax.policies.common.influence import unit


@register_selector("rds")
@options.including(EmbeddingOptions)
def rds(shared: EmbeddingOptions, *, tokens: str = "all") -> Selector:
    """Has the target groups choose in turn, of each group its targets in turn, each the most similar candidate left.

    The similarity is the cosine of two embeddings, each a pool of the current model's last hidden states, by default
    the mean in which the j-th weighs j, or from another source that `shared` names. Turn
    t, from 0, is that of group `t % G`, and there of target `(t // G) % (targets of the group)`, until `num` candidates
    are chosen. Over several checkpoints, cosines are summed with the checkpoints' weights first.

    A choice's scores are the candidates' largest similarities to any target. Candidates without a finite embedding have
    none; targets without one have no turn. Only forward passes are needed, but a similarity of each candidate to each
    target: with N candidates and M targets 4 N M bytes, about three times while the choice is made, which compares all
    candidates left at every turn. `config.targets.group_rows` bounds M.

    Args:
        shared: whose embeddings; see `EmbeddingOptions`.
        tokens: whose hidden states are pooled: "all" of a row, as the authors do; "inputs": all but its last one, which
            is only predicted in training, so that rows are as long as there.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.one_of("tokens", tokens, TOKENS)
    if shared.fixed and tokens != "all":
        options.refuse("tokens", tokens, "not used, an embedding model reads all of a text; leave it 'all'")
    embedding = shared.signal("position_weighted", whole=tokens == "all")

    def score(state: dict, signals: Signals, request: Request) -> tuple[Evidence, dict]:
        found, sizes = target_similarities(embedding, signals)
        return Evidence(found, jnp.asarray(sizes)), state

    def choose(evidence: Evidence, request: Request, num: int) -> Choice:
        ids = in_turn(evidence.rows, evidence.shared, num)
        all_scores = jnp.max(evidence.rows, axis=1)
        return Choice(ids=ids, scores=all_scores[ids], all_scores=all_scores)

    return Selector(score=score, choose=choose, needs=needs(embedding))


def target_similarities(
    embedding: Embeddings | FixedEmbeddings, signals: Signals
) -> tuple[Float[np.ndarray, "N M"], Int[np.ndarray, " G"]]:
    """The cosine of each candidate with each target, the targets group by group, and how many each group has.

    Targets without a finite embedding other than zero are left out. NaN throughout for such a candidate.

    Raises:
        InputError: there is no target set, or a group of it has no target left.
    """
    if signals.targets is None:
        raise InputError("selector 'rds' needs a target set to compare the candidates with")
    groups, names = np.asarray(signals.targets.groups), signals.targets.group_names
    by_group = np.argsort(groups, kind="stable")
    asked = ((1.0, signals),) if isinstance(embedding, FixedEmbeddings) else signals.checkpoints
    total, usable = np.float32(0), np.ones(len(by_group), bool)
    for weight, checkpoint in asked:
        directions = unit(jnp.asarray(checkpoint.targets.sweep(embedding, ids=by_group), jnp.float32))
        usable &= np.isfinite(directions).all(axis=1)
        total = total + np.float32(weight) * similarities(checkpoint.candidates, embedding, directions)
    sizes = np.bincount(groups[by_group][usable], minlength=len(names)).astype(np.int32)
    for name, size in zip(names, sizes, strict=True):
        if size == 0:
            raise InputError(f"selector 'rds': no target of group {name!r} has a finite embedding to compare with")
    return total[:, usable], sizes


def in_turn(similarities: Float[Array, "n M"], sizes: Int[Array, " G"], num: int) -> Int[Array, " num"]:
    """The candidates in the order in which targets choose them; of equally similar ones the first.

    Args:
        similarities: of candidates to targets, the targets group by group.
        sizes: targets of each group, at least one.
        num: how many to choose, at most n.
    """
    of_target = similarities.T
    starts = jnp.cumsum(sizes) - sizes
    num_groups = sizes.shape[0]

    def choose_one(turn: Int[Array, ""], carry: tuple[Bool[Array, " n"], Int[Array, " num"]]):
        taken, ids = carry
        group = turn % num_groups
        target = starts[group] + (turn // num_groups) % sizes[group]
        best = jnp.argmax(jnp.where(taken, -jnp.inf, of_target[target])).astype(jnp.int32)
        return taken.at[best].set(True), ids.at[turn].set(best)

    taken = jnp.zeros(similarities.shape[0], bool)
    _, ids = jax.lax.fori_loop(0, num, choose_one, (taken, jnp.zeros(num, jnp.int32)))
    return ids
