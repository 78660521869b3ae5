"""The train step: one pure function `(state, batch) -> (state, metrics)` with the policy's state inside `state`.

B rows in the global batch, T tokens a row, K domains. A batch is a dict of global arrays: tokens int32 [B, T+1], mask
float32 [B, T] (1 where a token counts), domain int32 [B], drawn_with float32 [K].
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dataflex_jax.models import decoder
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.policies.base import Mixer, Observation
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.sharding import placed

PyTree = Any
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: optimizer steps done, int32.
        params: model parameters.
        opt_state: of the optax transformation.
        mixer: the mixer's state.
        key: the run's policy key, constant; steps and updates are folded in.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    mixer: PyTree
    key: PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The train step of one run; call it under `jax.jit` with the state donated.

    Attributes:
        graphdef: the model's static part.
        optimizer: optax transformation.
        learning_rate: the schedule inside `optimizer`, for the metrics.
        mixer: the mixing policy.
        schedule: the mixer's schedule.
        grad_accumulation: microbatches; row b belongs to microbatch `b % grad_accumulation`, so that every device keeps
            its own rows. The result does not depend on it but for rounding.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    mixer: Mixer
    schedule: Schedule
    grad_accumulation: int = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, PyTree]]:
        """One optimizer step.

        Returns:
            The new state and the metrics: loss (the objective, nats a token), grad_norm, learning_rate, tokens,
            domain_loss / domain_rows [K], drawn_with [K], and the mixer's state and sampling_weights after the step.
        """
        num_domains = batch["drawn_with"].shape[0]
        token_weights = batch["mask"]
        if self.mixer.loss_weights is not None:
            token_weights = token_weights * self.mixer.loss_weights(state.mixer)[batch["domain"], None]
        token_weights = jax.lax.stop_gradient(token_weights / jnp.sum(token_weights))
        (loss, token_losses), gradients = self._gradients(state.params, batch["tokens"], token_weights)

        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        step = state.step + 1
        statistics = domain_statistics(token_losses, batch["mask"], batch["domain"], num_domains)
        observation = Observation(
            step=step,
            steps_since_warmup=step - self.schedule.warmup_step,
            update=self.schedule.update_index(step),
            key=state.key,
            drawn_with=batch["drawn_with"],
            domain_loss=statistics.loss,
            domain_rows=statistics.rows,
            domain_tokens=statistics.tokens,
            token_losses=token_losses,
            mask=batch["mask"],
            domains=batch["domain"],
        )
        mixer = self.mixer.update(state.mixer, observation)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": self.learning_rate(state.step),
            "tokens": jnp.sum(statistics.tokens),
            "domain_loss": statistics.loss,
            "domain_rows": statistics.rows,
            "drawn_with": batch["drawn_with"],
            "mixer": mixer,
            "sampling_weights": self.mixer.sampling_weights(mixer),
        }
        return TrainState(step, params, opt_state, mixer, state.key), metrics

    def _gradients(self, params: PyTree, tokens: Int[Array, "B T1"], token_weights: Float[Array, "B T"]):
        """((loss, token losses [B, T]), gradients) of the weighted sum of the token losses, summed over microbatches."""

        def loss_fn(params, tokens, weights):
            losses, _ = decoder.token_losses(self.graphdef, params, tokens)
            return jnp.sum(weights * losses), losses

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if self.grad_accumulation == 1:
            return value_and_grad(params, tokens, token_weights)

        def split(x):
            return jnp.swapaxes(x.reshape(-1, self.grad_accumulation, *x.shape[1:]), 0, 1)

        def add(total, microbatch):
            (loss, losses), gradients = value_and_grad(params, *microbatch)
            return jax.tree.map(jnp.add, total, (loss, gradients)), losses

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (loss, gradients), losses = jax.lax.scan(add, zero, (split(tokens), split(token_weights)))
        return (loss, jnp.swapaxes(losses, 0, 1).reshape(token_weights.shape)), gradients


class DomainStatistics(NamedTuple):
    """Per domain over a batch: token-mean loss (0 where it has no token), rows, tokens that count; each [K]."""

    loss: Float[Array, " K"]
    rows: Int[Array, " K"]
    tokens: Float[Array, " K"]


def domain_statistics(
    token_losses: Float[Array, "B T"], mask: Float[Array, "B T"], domains: Int[Array, " B"], num_domains: int
) -> DomainStatistics:
    """Credits every row's losses to the row's own domain."""
    row_tokens = jnp.sum(mask, axis=1)
    # A masked sum, not a matrix product, which GPUs would round to TF32.
    member = domains[:, None] == jnp.arange(num_domains)
    tokens = jnp.sum(member * row_tokens[:, None], axis=0)
    nll = jnp.sum(member * jnp.sum(mask * token_losses, axis=1)[:, None], axis=0)
    rows = jnp.sum(member & (row_tokens > 0)[:, None], axis=0)
    return DomainStatistics(nll / jnp.maximum(tokens, 1.0), rows, tokens)


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mixer: PyTree, key: PRNGKeyArray
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part and a fresh state with random weights; `mixer` is the mixer's initial state."""
    model_key, policy_key = jax.random.split(key)
    graphdef, params = decoder.create(config, model_key)
    return graphdef, TrainState(jnp.int32(0), params, optimizer.init(params), mixer, policy_key)


def abstract_state(init: Callable[[PRNGKeyArray], Any], mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """What `init` (`init_state` awaiting its key) would return, as shapes, dtypes and shardings; computes nothing."""
    graphdef, shapes = jax.eval_shape(init, jax.random.key(0))
    return graphdef, placed(mesh, shapes)


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no floating-point leaf has a NaN or an infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def eval_step(graphdef: nnx.GraphDef, num_domains: int, params: PyTree, batch: Batch) -> tuple[Array, Array]:
    """(sum of the token losses, tokens) of each domain over one batch, float32 [K] each."""
    losses, _ = decoder.token_losses(graphdef, params, batch["tokens"])
    statistics = domain_statistics(losses, batch["mask"], batch["domain"], num_domains)
    return statistics.loss * statistics.tokens, statistics.tokens
