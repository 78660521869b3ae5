"""The train step: one pure function `(state, batch) -> (state, metrics)` with the policy's state inside `state`.

B rows in the global batch, T tokens a row, K domains. A batch is a dict of global arrays: tokens int32 [B, T+1], mask
float32 [B, T] (1 where a token counts), domain int32 [B], drawn_with float32 [K]; where rows are padded, lengths int32
[B] (inputs without padding; otherwise T); where they are packed, segment_ids and positions int32 [B, T]; where the
reference model's losses are cached, reference_losses float32 [B, T].
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
from dataflex_jax.models.layout import placed
from dataflex_jax.policies.base import Mixer, Observation
from dataflex_jax.policies.schedule import Schedule
from dataflex_jax.training import objective
from dataflex_jax.training.objective import Forward, ScheduledWeighter, Weights

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
        weighters: the weighters' states, in their order.
        key: the run's policy key, constant; steps and updates are folded in.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    mixer: PyTree
    weighters: tuple[PyTree, ...]
    key: PRNGKeyArray


class Fixed(NamedTuple):
    """Parameters that a step reads and does not change.

    Attributes:
        frozen: those beside the trained ones (LoRA's base); None where all are trained.
        reference: of the reference model, where its losses are computed in the step.
    """

    frozen: PyTree | None = None
    reference: PyTree | None = None


_NOTHING_FIXED = Fixed()


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The train step of one run; call it under `jax.jit` with the state donated.

    Attributes:
        graphdef: the model's static part.
        optimizer: optax transformation.
        learning_rate: the schedule inside `optimizer`, for the metrics.
        mixer: the mixing policy.
        schedule: the mixer's schedule.
        weighters: the weighting policies.
        reference_graphdef: of the reference model, where its losses are computed in the step.
        grad_accumulation: microbatches; row b belongs to microbatch `b % grad_accumulation`, so that every device keeps
            its own rows. The result does not depend on it but for rounding, unless `weigh_microbatches`.
        weigh_microbatches: with microbatches, policies that weight the loss see one microbatch at a time (and a mixer's
            weights are the last step's). Otherwise a forward pass over all microbatches comes first, about a third of
            a step more.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    mixer: Mixer
    schedule: Schedule
    weighters: tuple[ScheduledWeighter, ...] = ()
    reference_graphdef: nnx.GraphDef | None = None
    grad_accumulation: int = 1
    weigh_microbatches: bool = False
    __name__ = "train_step"

    def __call__(
        self, state: TrainState, batch: Batch, fixed: Fixed = _NOTHING_FIXED
    ) -> tuple[TrainState, dict[str, PyTree]]:
        """One optimizer step.

        Args:
            state: is replaced by the new one.
            batch: see the module.
            fixed: parameters that are not trained.

        Returns:
            The new state and the metrics: loss (the objective, nats a token), grad_norm, learning_rate, tokens (that
            count in the loss), inputs (without padding), domain_loss / domain_rows [K], drawn_with [K], the mixer's
            state and sampling_weights after the step; with weighters also example_weight_{min,max,mean} and
            effective_sample_size; with a reference model domain_excess [K], the mean excess over it.
        """
        row_keys = dropout_keys(state.key, state.step, batch["tokens"].shape[0])
        (loss, (forward, weights)), gradients = self._gradients(state, fixed, batch | {"row_keys": row_keys})
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        num_domains = batch["drawn_with"].shape[0]
        statistics = domain_statistics(forward.token_losses, batch["mask"], batch["domain"], num_domains)
        mixer = self._observed(state, batch, forward)
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
        if self.weighters:
            metrics |= objective.statistics(weights.rows)
        if forward.reference_losses is not None:
            excess = jnp.maximum(forward.token_losses - forward.reference_losses, 0.0)
            metrics["domain_excess"] = domain_statistics(excess, batch["mask"], batch["domain"], num_domains).loss
        return TrainState(state.step + 1, params, opt_state, mixer, state.weighters, state.key), metrics

    def _observed(self, state: TrainState, batch: Batch, forward: Forward) -> PyTree:
        """The mixer's state after it has seen the batch's losses."""
        step = state.step + 1
        statistics = domain_statistics(
            forward.token_losses, batch["mask"], batch["domain"], batch["drawn_with"].shape[0]
        )
        observation = Observation(
            step=step,
            steps_since_warmup=step - self.schedule.warmup_step,
            update=self.schedule.update_index(step),
            key=state.key,
            drawn_with=batch["drawn_with"],
            domain_loss=statistics.loss,
            domain_rows=statistics.rows,
            domain_tokens=statistics.tokens,
            token_losses=forward.token_losses,
            mask=batch["mask"],
            domains=batch["domain"],
            reference_losses=forward.reference_losses,
        )
        return self.mixer.update(state.mixer, observation)

    def _gradients(self, state: TrainState, fixed: Fixed, batch: Batch):
        """((loss, (Forward, Weights)), gradients) of the weighted sum of the token losses."""

        def objective_of(params, rows, weights=None):
            forward = self._forward(params, fixed, rows)
            if weights is None:
                weights = self._weights(state, rows, jax.lax.stop_gradient(forward))
            return jnp.sum(weights.tokens * forward.token_losses), (forward, weights)

        gradients = jax.value_and_grad(objective_of, has_aux=True)
        if self.grad_accumulation == 1:
            return gradients(state.params, batch)

        shared = {"drawn_with": batch["drawn_with"]}
        microbatches = self._split({name: value for name, value in batch.items() if name not in shared})
        weights = None
        if not self.weigh_microbatches:
            weights = self._batch_weights(state, fixed, batch, microbatches, shared)

        def add(total, microbatch):
            rows, weights = microbatch
            (loss, aux), grads = gradients(state.params, rows | shared, weights)
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), aux = jax.lax.scan(add, zero, (microbatches, self._split(weights)))
        if self.weigh_microbatches:
            loss, grads = jax.tree.map(lambda x: x / self.grad_accumulation, (loss, grads))
        return (loss, self._joined(aux)), grads

    def _batch_weights(
        self, state: TrainState, fixed: Fixed, batch: Batch, microbatches: Batch, shared: Batch
    ) -> Weights:
        """The weights of the whole batch, after a forward pass over its microbatches where they depend on losses."""
        if not self.weighters and self.mixer.loss_weights is None:
            return self._weights(state, batch, Forward(jnp.zeros_like(batch["mask"]), (), None))
        forward = jax.lax.map(lambda rows: self._forward(state.params, fixed, rows | shared), microbatches)
        return self._weights(state, batch, self._joined(forward))

    def _forward(self, params: PyTree, fixed: Fixed, rows: Batch) -> Forward:
        model = lora.combine(fixed.frozen, params)
        losses, hidden = _token_losses(self.graphdef, model, rows, frozen_head=fixed.frozen is not None)
        reference = rows.get("reference_losses")
        if self.reference_graphdef is not None:
            evaluated = {name: value for name, value in rows.items() if name != "row_keys"}
            reference, _ = jax.lax.stop_gradient(_token_losses(self.reference_graphdef, fixed.reference, evaluated))
        return Forward(losses, objective.embeddings(self.weighters, hidden, rows), reference)

    def _weights(self, state: TrainState, rows: Batch, forward: Forward) -> Weights:
        mixer = state.mixer
        if self.mixer.loss_weights is not None and not (self.weigh_microbatches and self.grad_accumulation > 1):
            mixer = self._observed(state, rows, forward)
        return objective.weigh(
            self.mixer, self.weighters, mixer, state.weighters, rows, forward, state.step + 1, state.key
        )

    def _split(self, rows: PyTree) -> PyTree:
        """[B, ...] -> [microbatches, B / microbatches, ...]."""
        parts = self.grad_accumulation
        return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), rows)

    def _joined(self, rows: PyTree) -> PyTree:
        """The inverse of `_split`."""
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), rows)


def _token_losses(
    graphdef: nnx.GraphDef, params: PyTree, inputs: dict[str, Array], *, frozen_head: bool = False
) -> tuple[Float[Array, "B T"], Float[Array, "B T D"]]:
    options = {name: inputs[name] for name in _PACKED if name in inputs} | {"frozen_head": frozen_head}
    return decoder.token_losses(graphdef, params, inputs["tokens"], dropout_keys=inputs.get("row_keys"), **options)


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
    weighters: tuple[PyTree, ...],
    key: PRNGKeyArray,
    pretrained: PyTree | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part and a fresh state.

    Args:
        config: the model's shape; with config.lora, what is trained are the adapters.
        optimizer: the optimizer.
        mixer: the mixer's initial state.
        weighters: the weighters' initial states.
        key: of all randomness.
        pretrained: the trained parameters to start from; None: random ones.
    """
    model_key, policy_key = initial_keys(key)
    graphdef, params = decoder.create(config, model_key)
    if config.lora is not None:
        _, params = lora.split(params)
    if pretrained is not None:
        params = pretrained
    return graphdef, TrainState(jnp.int32(0), params, optimizer.init(params), mixer, weighters, policy_key)


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
    losses, _ = _token_losses(graphdef, params, batch)
    statistics = domain_statistics(losses, batch["mask"], batch["domain"], num_domains)
    return statistics.loss * statistics.tokens, statistics.tokens
