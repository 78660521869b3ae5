"""Weights from alignment with a target set minus redundancy within the batch: rows that move the model alike share.

The formulas are those of the weighter of this name in the PyTorch peer, DataFlex 1.1.0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import TARGETS, RowObservation, Signals, Weighter, options, register_weighter
from dataflex_jax.policies.common import pooling
from dataflex_jax.policies.common.anchors import TOKENS, mean_target

OBJECTIVES = ("full", "align_only", "diverse_only", "uniform")
POOLINGS = {"last": pooling.last_token, "mean": pooling.mean}


class JointUpdateAwareState(NamedTuple):
    """target: direction of the target set's mean embedding, float32 [D]; 0 before the first refresh."""

    target: Float[Array, " D"]


@register_weighter("joint_update_aware")
def joint_update_aware(
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    iterations: int = 5,
    damping: float = 1.0,
    objective: str = "full",
    pooling: str = "last",
    tokens: str = "inputs",
    refresh_interval: int = 50,
) -> Weighter:
    """Weighs the B rows of a batch by `B w`, w a distribution that favours rows near the targets, far from each other.

    With z_b the rows' unit embeddings and u the direction of the mean of the target set's (whose lengths count), `s_b =
    <z_b, u>` and `S_bc = <z_b, z_c>`. w is sought by `iterations` steps from the uniform distribution of

        w <- (1 - damping) w + damping softmax((s - beta S w) / tau)

    Args:
        beta: weight of the redundancy S w, >= 0.
        tau: temperature, > 0; the smaller, the fewer rows count.
        iterations: number of steps, >= 1.
        damping: share of each step that is taken, in (0, 1]; below 1 it calms oscillation where beta / tau is large.
        objective: "full"; "align_only" leaves S out, "diverse_only" s; "uniform": all rows count the same.
        pooling: the hidden state of a row's "last" token, or the "mean" over them (the peer's: over the response's).
        tokens: whose hidden states are embedded: "inputs": of what the model reads for the loss, all tokens of a row
            but its last one, which is only predicted; "all": of that too, as in the PyTorch peer, for which all rows
            have one more input in the forward pass.
        refresh_interval: steps between two embeddings of the target set.

    Raises:
        ValueError: a hyperparameter out of its range.
        InputError: from `refresh`, without a target set that the objective needs.
    """
    options.at_least("beta", beta, 0)
    options.positive("tau", tau)
    options.between("iterations", iterations, 1, 10_000)
    options.between("damping", damping, 0, 1, open_low=True)
    options.one_of("objective", objective, OBJECTIVES)
    options.one_of("pooling", pooling, tuple(POOLINGS))
    options.one_of("tokens", tokens, TOKENS)
    options.at_least("refresh_interval", refresh_interval, 1)
    embed, whole = POOLINGS[pooling], tokens == "all"
    aligns = objective in ("full", "align_only")
    embed_target = functools.partial(embed, normalised=False)

    def weigh(state: JointUpdateAwareState, observation: RowObservation) -> Float[Array, " B"]:
        z, rows = observation.embeddings, observation.losses.shape[0]
        uniform = jnp.full((rows,), 1 / rows, jnp.float32)
        if objective == "uniform":
            return rows * uniform
        aligned, redundancy = jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, rows), jnp.float32)
        if objective != "diverse_only":
            aligned = jnp.dot(z, state.target, precision="highest")
        if objective != "align_only":
            redundancy = beta * jnp.dot(z, z.T, precision="highest")

        def improved(_: int, w: Float[Array, " B"]) -> Float[Array, " B"]:
            score = aligned - jnp.dot(redundancy, w, precision="highest")
            return (1 - damping) * w + damping * jax.nn.softmax(score / tau)

        return rows * jax.lax.fori_loop(0, iterations, improved, uniform)

    def refresh(state: JointUpdateAwareState, signals: Signals) -> JointUpdateAwareState:
        target = jnp.asarray(mean_target("joint_update_aware", embed_target, signals, whole=whole))
        return JointUpdateAwareState(target / jnp.maximum(jnp.linalg.norm(target), 1e-8))

    return Weighter(
        init=lambda width: JointUpdateAwareState(jnp.zeros((width,), jnp.float32)),
        weigh=weigh,
        embed=embed if objective != "uniform" else None,
        embeds_whole=whole,
        refresh=refresh if aligns else None,
        refresh_interval=refresh_interval,
        needs=frozenset({TARGETS}) if aligns else frozenset(),
    )
