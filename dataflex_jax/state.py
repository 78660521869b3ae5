"""The train step: one pure function `(state, batch) -> (state, metrics)` with the policy's state inside `state`.

B rows in the global batch, T tokens a row, K domains. A batch is a dict of global arrays: tokens int32 [B, T+1], mask
float32 [B, T] (1 where a token counts), domain int32 [B], drawn_with float32 [K]; where rows are padded, lengths int32
[B] (inputs without padding; otherwise T); where they are packed, segment_ids and positions int32 [B, T].
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

from dataflex_jax.models import decoder, lora
from dataflex_jax.models.config import ModelConfig
from dataflex_jax.policies.base import Mixer, Observation
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.sharding import placed

PyTree = Any
Batch = dict[str, jax.Array]
_PACKED = ("segment_ids", "positions")


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: optimizer steps done, int32.
        params: the parameters that are trained: all of the model's, or its adapters (`models/lora.py`).
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

    def __call__(
        self, state: TrainState, batch: Batch, frozen: PyTree | None = None
    ) -> tuple[TrainState, dict[str, PyTree]]:
        """One optimizer step.

        Args:
            state: is replaced by the new one.
            batch: see the module.
            frozen: the parameters beside state.params that are not trained; None where all are.

        Returns:
            The new state and the metrics: loss (the objective, nats a token), grad_norm, learning_rate, tokens (that
            count in the loss), inputs (without padding), domain_loss / domain_rows [K], drawn_with [K], and the
            mixer's state and sampling_weights after the step.
        """
        num_domains = batch["drawn_with"].shape[0]
        token_weights = batch["mask"]
        if self.mixer.loss_weights is not None:
            token_weights = token_weights * self.mixer.loss_weights(state.mixer)[batch["domain"], None]
        token_weights = jax.lax.stop_gradient(token_weights / jnp.sum(token_weights))
        inputs = {name: batch[name] for name in ("tokens", *_PACKED) if name in batch}
        inputs["row_keys"] = dropout_keys(state.key, state.step, batch["tokens"].shape[0])
        (loss, token_losses), gradients = self._gradients(state.params, frozen, inputs, token_weights)

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
            "inputs": jnp.sum(batch["lengths"]) if "lengths" in batch else jnp.int32(batch["mask"].size),
            "domain_loss": statistics.loss,
            "domain_rows": statistics.rows,
            "drawn_with": batch["drawn_with"],
            "mixer": mixer,
            "sampling_weights": self.mixer.sampling_weights(mixer),
        }
        return TrainState(step, params, opt_state, mixer, state.key), metrics

    def _gradients(
        self,
        params: PyTree,
        frozen: PyTree | None,
        inputs: dict[str, Array],
        token_weights: Float[Array, "B T"],
    ):
        """((loss, token losses [B, T]), gradients) of the weighted sum of the token losses, summed over
        microbatches."""

        def loss_fn(params, inputs, weights):
            losses = _token_losses(self.graphdef, lora.combine(frozen, params), inputs)
            return jnp.sum(weights * losses), losses

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if self.grad_accumulation == 1:
            return value_and_grad(params, inputs, token_weights)

        def split(x):
            return jnp.swapaxes(x.reshape(-1, self.grad_accumulation, *x.shape[1:]), 0, 1)

        def add(total, microbatch):
            (loss, losses), gradients = value_and_grad(params, *microbatch)
            return jax.tree.map(jnp.add, total, (loss, gradients)), losses

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (loss, gradients), losses = jax.lax.scan(add, zero, jax.tree.map(split, (inputs, token_weights)))
        return (loss, jnp.swapaxes(losses, 0, 1).reshape(token_weights.shape)), gradients


def _token_losses(graphdef: nnx.GraphDef, params: PyTree, inputs: dict[str, Array]) -> Float[Array, "B T"]:
    packed = {name: inputs[name] for name in _PACKED if name in inputs}
    return decoder.token_losses(graphdef, params, inputs["tokens"], dropout_keys=inputs.get("row_keys"), **packed)[0]


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
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mixer: PyTree,
    key: PRNGKeyArray,
    pretrained: PyTree | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part and a fresh state.

    Args:
        config: the model's shape; with config.lora, what is trained are the adapters.
        optimizer: the optimizer.
        mixer: the mixer's initial state.
        key: of all randomness.
        pretrained: the trained parameters to start from; None: random ones.
    """
    model_key, policy_key = initial_keys(key)
    graphdef, params = decoder.create(config, model_key)
    if config.lora is not None:
        _, params = lora.split(params)
    if pretrained is not None:
        params = pretrained
    return graphdef, TrainState(jnp.int32(0), params, optimizer.init(params), mixer, policy_key)


def initial_keys(key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The run's key in two: for the model's random weights, and for the policies."""
    return tuple(jax.random.split(key))


def dropout_keys(key: PRNGKeyArray, step: Int[Array, ""], rows: int) -> PRNGKeyArray:
    """One key [rows] for each row of the step's batch.

    They depend on the run's key, the step and the row's place in the global batch, so microbatches and devices do not
    change a row's dropout.
    """
    # Policies fold steps into the run's key; none of them reaches this number.
    stream = jax.random.fold_in(key, jnp.uint32(2**32 - 1))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(stream, step), jnp.arange(rows))


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
    losses = _token_losses(graphdef, params, batch)
    statistics = domain_statistics(losses, batch["mask"], batch["domain"], num_domains)
    return statistics.loss * statistics.tokens, statistics.tokens
