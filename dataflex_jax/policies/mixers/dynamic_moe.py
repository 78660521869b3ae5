"""Mixing by router load: domains whose tokens use other experts than the rest get more weight.

Zhu et al. 2024, "Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts", arXiv 2406.11256.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dataflex_jax.policies import HELD_OUT, ROUTERS, GateLoads, Mixer, Signals, options, register_mixer
from dataflex_jax.policies.proportions import Proportions, starting_proportions


class DynamicMoeState(NamedTuple):
    """The mixer's memory.

    Attributes:
        weights: float32 [K], what is sampled from.
        distance: float32 [K], D of the last update, 0 before the first.
        count: updates so far.
    """

    weights: Float[Array, " K"]
    distance: Float[Array, " K"]
    count: Int[Array, ""]


@register_mixer("dynamic_moe")
def dynamic_moe(*, eta: float = 10.0, c: float = 0.05, initial_proportions: Proportions = None) -> Mixer:
    """Samples a domain more often the more the load that it puts on the experts differs from the other domains'.

    At each scheduled update, O_i is the share of the tokens of domain i's probe set that each expert of the last block
    gets; the probe sets are held-out rows, at most `config.eval_rows` a domain, which are never trained on.

        D_i = mean_j |O_i - O_j|_2,   w <- softmax(log w + eta D),   w <- (1 - c) w + c / K

    The router itself is frozen by `config.model.trainable = ("*", "!*/router/*")`.

    Args:
        eta: step size, > 0.
        c: share of the uniform distribution in w, in [0, 1].
        initial_proportions: K weights or "uniform" to start from; None: the run's proportions.

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.positive("eta", eta)
    options.between("c", c, 0, 1)

    def init(natural: Float[Array, " K"]) -> DynamicMoeState:
        weights = starting_proportions("initial_proportions", initial_proportions, natural)
        return DynamicMoeState(weights, distance=jnp.zeros_like(weights), count=jnp.int32(0))

    @jax.jit
    def moved(state: DynamicMoeState, loads: Float[Array, "K E"]) -> DynamicMoeState:
        shares = loads / jnp.sum(loads, axis=1, keepdims=True)
        distance = jnp.mean(jnp.linalg.norm(shares[:, None] - shares[None], axis=-1), axis=1)
        weights = jax.nn.softmax(jnp.log(state.weights) + eta * distance)
        weights = (1 - c) * weights + c / weights.shape[0]
        return DynamicMoeState(weights, distance, state.count + 1)

    def refresh(state: DynamicMoeState, signals: Signals) -> DynamicMoeState:
        of_rows, rows = signals.held_out.sweep(GateLoads("last")), signals.held_out
        of_domains = np.zeros((len(rows.group_names), of_rows.shape[1]))
        np.add.at(of_domains, rows.groups, of_rows)
        return moved(state, jnp.asarray(of_domains, jnp.float32))

    def on_resume(old: DynamicMoeState, fresh: DynamicMoeState) -> DynamicMoeState:
        # From a weight of 0 no distance would lead away.
        weights = jnp.where((old.count > 0) & (old.weights > 0), old.weights, fresh.weights)
        return old._replace(weights=weights / jnp.sum(weights))

    return Mixer(
        init=init,
        update=lambda state, observation: state,
        sampling_weights=lambda state: state.weights,
        on_resume=on_resume,
        refresh=refresh,
        needs=frozenset({HELD_OUT, ROUTERS}),
    )
