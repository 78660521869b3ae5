"""Scaling laws `L(n) = exp(e) + exp(a) n^(-b)` fitted to losses.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556, approach 3: the Huber loss of
log L, minimised by L-BFGS from several starts; bounds and grid of starts as the authors of ADO (arXiv 2410.11820)
choose them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

_DELTA = 1e-3  # of the Huber loss: beyond it, residuals of log L count linearly
_STARTS = 24
_ITERATIONS = 100


def fit(samples: Float[Array, " H"], losses: Float[Array, " H"], counts: Float[Array, " H"]) -> Float[Array, " 3"]:
    """(a, e, b) of one law.

    Minimises `sum_h huber(log L(n_h) - log L_h)` plus the excess of a over 6.5, of 0.5 over e, of b over 0.8 and of
    0.001 over b. Of a grid of 512 starts, L-BFGS refines the best 24.

    Args:
        samples: n of each point, > 0 where it counts.
        losses: L of each point in nats, > 0 where it counts.
        counts: > 0 where the point counts.

    Returns:
        float32; not finite where no start led to a finite one.
    """
    counted = counts > 0
    log_n = jnp.log(jnp.where(counted, samples, 1.0))
    log_losses = jnp.log(jnp.where(counted, losses, 1.0))
    number = jnp.maximum(jnp.sum(counted), 1)
    # About the middle of log n, a and b hardly depend on each other, which L-BFGS needs.
    middle = jnp.sum(log_n * counted) / number

    def objective(parameters: Float[Array, " 3"]) -> Float[Array, ""]:
        a_middle, e, b = parameters
        predicted = jnp.logaddexp(a_middle - b * (log_n - middle), e)
        residuals = optax.huber_loss(predicted, log_losses, delta=_DELTA)
        beyond = (a_middle + b * middle - 6.5, 0.5 - e, b - 0.8, 0.001 - b)
        bounds = sum(jnp.maximum(x, 0.0) for x in beyond)
        # The unit of float32 tolerances inside the line search; the minimum stays where it is.
        return (jnp.sum(residuals, where=counted) + bounds) / (_DELTA * number)

    grid = jnp.meshgrid(
        jnp.arange(-2.0, 6.0, 1.0), jnp.arange(-2.0, 2.0, 0.5), jnp.arange(0.0, 0.8, 0.1), indexing="ij"
    )
    a, e, b = (axis.ravel() for axis in grid)
    starts = jnp.stack([a - b * middle, e, b], axis=1)
    best = jax.lax.top_k(-jax.vmap(objective)(starts), _STARTS)[1]
    # GPUs would round L-BFGS's inner products to TF32.
    with jax.default_matmul_precision("highest"):
        refined, values = jax.vmap(lambda start: _minimised(objective, start))(starts[best])
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    a_middle, e, b = jnp.where(jnp.isfinite(jnp.min(values)), refined[jnp.argmin(values)], jnp.nan)
    return jnp.stack([a_middle + b * middle, e, b])


def _minimised(
    objective: Callable[[Float[Array, " 3"]], Float[Array, ""]], start: Float[Array, " 3"]
) -> tuple[Float[Array, " 3"], Float[Array, ""]]:
    """(minimum, value there) by L-BFGS."""
    # Not the default zoom search, which does not end for some mapped laws of few points (optax 0.2.8, CPU).
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=30, decrease_factor=0.5, increase_factor=jnp.inf, max_learning_rate=1.0, store_grad=True
    )
    optimizer = optax.lbfgs(linesearch=search)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry, _):
        parameters, state = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=objective)
        return (optax.apply_updates(parameters, updates), state), None

    (parameters, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=_ITERATIONS)
    return parameters, objective(parameters)
