"""ADAPT: weights from the similarity of each row to a target set, under the model as it is now.

"Rethinking Data Curation in LLM Training: Online Reweighting Offers Better Generalization",
arXiv 2605.05227.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import TARGETS, RowObservation, Signals, Weighter, options, register_weighter
from dataflex_jax.policies.common.anchors import TOKENS, mean_target
from dataflex_jax.policies.common.pooling import position_weighted_mean

NORMALIZATIONS = ("batch", "mean", "sum")


class AdaptState(NamedTuple):
    """anchor: mean embedding of the target set, float32 [D]; 0 before the first refresh."""

    anchor: Float[Array, " D"]


@register_weighter("adapt")
def adapt(
    *,
    tau: float = 1.0,
    clip: float | None = None,
    normalize: str = "batch",
    tokens: str = "inputs",
    refresh_interval: int = 50,
) -> Weighter:
    """Weighs a row by `sigmoid(s_b / tau)`, `s_b` its mean cosine to the M rows of the target set.

    `s_b = mean_m <phi_b, anchor_m> = <phi_b, mean_m anchor_m>`, so the state holds one vector however large M is. phi
    is the position-weighted mean of the last hidden states, L2-normalised: of the training forward pass for the rows,
    in evaluation mode for the anchors.

    The loss of B rows is

    * "batch": `sum_b w_b l_b / B`; sigmoids are near 1/2, so it is about half the plain loss.
    * "mean": `sum_b w_b l_b / sum_b w_b`; keeps the scale of the plain loss, what matters is only who counts more.
    * "sum": `sum_b w_b l_b`, the PyTorch peer; grows with the batch.

    Args:
        tau: temperature, > 0; the smaller, the more the weights differ.
        clip: upper bound of the sigmoid, > 0; None: 1.
        normalize: one of the above.
        tokens: whose hidden states are embedded: "inputs": of what the model reads for the loss, all tokens of a row
            but its last one, which is only predicted; "all": of that too, as in the PyTorch peer, for which all rows
            have one more input in the forward pass.
        refresh_interval: steps between two embeddings of the target set.

    Raises:
        ValueError: a hyperparameter out of its range.
        InputError: from `refresh`, without a target set.
    """
    options.positive("tau", tau)
    if clip is not None:
        options.positive("clip", clip)
    options.one_of("normalize", normalize, NORMALIZATIONS)
    options.one_of("tokens", tokens, TOKENS)
    options.at_least("refresh_interval", refresh_interval, 1)
    whole = tokens == "all"

    def weigh(state: AdaptState, observation: RowObservation) -> Float[Array, " B"]:
        similarity = jnp.dot(observation.embeddings, state.anchor, precision="highest")
        weights = jax.nn.sigmoid(similarity / tau)
        if clip is not None:
            weights = jnp.minimum(weights, clip)
        match normalize:
            case "sum":
                return weights * weights.shape[0]
            case "mean":
                return weights / jnp.mean(weights)
            case _:
                return weights

    def refresh(state: AdaptState, signals: Signals) -> AdaptState:
        return AdaptState(jnp.asarray(mean_target("adapt", position_weighted_mean, signals, whole=whole)))

    return Weighter(
        init=lambda width: AdaptState(jnp.zeros((width,), jnp.float32)),
        weigh=weigh,
        embed=position_weighted_mean,
        embeds_whole=whole,
        refresh=refresh,
        refresh_interval=refresh_interval,
        needs=frozenset({TARGETS}),
    )
