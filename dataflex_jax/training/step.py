"""The train step: one pure function `(state, batch) -> (state, metrics)` with the policy's state inside `state`.

B rows in the global batch, T tokens a row, K domains; see `data.batch.Batch`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dataflex_jax.data.batch import Batch, joined, split
from dataflex_jax.models.decoder import Hooks
from dataflex_jax.models.model import Model
from dataflex_jax.models.moe import balancing_loss, router_sums, z_loss
from dataflex_jax.policies.base import Mixer, Observation
from dataflex_jax.policies.schedule import Scheduled
from dataflex_jax.training import objective
from dataflex_jax.training.objective import Forward, Weighters, Weights
from dataflex_jax.training.oversampling import Oversampling
from dataflex_jax.training.state import NOTHING_FIXED, Fixed, TrainState


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The train step of one run; call it under `jax.jit` with the state donated.

    Attributes:
        model: its shape; the parameters are the state's.
        optimizer: optax transformation.
        learning_rate: the schedule inside `optimizer`, for the metrics.
        mixer: the mixing policy.
        weighters: the weighting policies.
        grad_accumulation: microbatches; row b belongs to microbatch `b % grad_accumulation`, so that every device keeps
            its own rows. The result does not depend on it but for rounding, unless `weigh_microbatches`.
        weigh_microbatches: with microbatches, policies that weight the loss see one microbatch at a time (and a mixer's
            weights are the last step's). Otherwise a forward pass over all microbatches comes first, about a third of
            a step more.
        oversampling: which rows are trained on of those that were drawn; None: all.

    >>> model, tokenizer = df.example()
    >>> rate, mixer = optax.constant_schedule(0.01), df.mixer("static")
    >>> shape, optimizer = df.Model.shape(model.config), optax.adamw(rate)
    >>> state = df.Start(shape, None, optimizer, mixer.policy.init(jnp.ones(1))).state(jax.random.key(0))
    >>> step = jax.jit(df.TrainStep(shape, optimizer, rate, mixer), donate_argnums=0)
    >>> state, metrics = step(state, df.batch(df.rows(["Ada", "Grace"], tokenizer), drawn_with=[1.0]))
    >>> int(state.step), int(metrics["tokens"])
    (1, 8)
    """

    model: Model
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    mixer: Scheduled[Mixer]
    weighters: Weighters = ()
    grad_accumulation: int = 1
    weigh_microbatches: bool = False
    oversampling: Oversampling | None = None
    __name__ = "train_step"

    def __call__(
        self, state: TrainState, batch: Batch, fixed: Fixed = NOTHING_FIXED
    ) -> tuple[TrainState, dict[str, PyTree]]:
        """One optimizer step.

        Args:
            state: is replaced by the new one.
            batch: drawn for this step. Of an oversampled one, all that follows is about the rows that are kept.
            fixed: parameters that are not trained.

        Returns:
            The new state and the metrics: loss (the objective, nats a token), grad_norm, learning_rate, tokens (that
            count in the loss), inputs (without padding), domain_loss / domain_rows [K], drawn_with [K], the mixer's
            state and sampling_weights after the step; with weighters also example_weight_{min,max,mean} and
            effective_sample_size; where anything weights the loss, token_weight_min, the least factor of a token's
            loss; of a mixture of experts router_balancing_loss and router_z_loss, which times their coefficients are
            part of the loss, of a microbatch, and domain_router_load [K, E], the shares of each domain's tokens that
            the experts of the last block got, 0 of a domain without any; with a reference model domain_excess [K], the
            mean excess over it; of an oversampled batch domain_kept [K], the share of each domain's rows that was kept,
            NaN where none was drawn.
        """
        drawn = batch
        if self.oversampling is not None:
            batch = self.oversampling.kept(self.model, state, fixed, drawn, self.learning_rate(state.step))
        row_keys = dropout_keys(state.key, state.step, batch.num_rows)
        (loss, (forward, weights, routing)), gradients = self._gradients(state, fixed, batch, row_keys)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        statistics = domain_statistics(forward.token_losses, batch)
        mixer = self._observed(state, batch, forward)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": self.learning_rate(state.step),
            "tokens": jnp.sum(statistics.tokens),
            "inputs": jnp.sum(batch.lengths),
            "domain_loss": statistics.loss,
            "domain_rows": statistics.rows,
            "drawn_with": batch.drawn_with,
            "mixer": mixer,
            "sampling_weights": self.mixer.policy.sampling_weights(mixer),
        }
        if self.weighters:
            metrics |= objective.statistics(weights.rows)
        if self.weighters or self.mixer.policy.loss_weights is not None:
            metrics["token_weight_min"] = jnp.min(weights.tokens)
        if forward.reference_losses is not None:
            excess = jnp.maximum(forward.token_losses - forward.reference_losses, 0.0)
            metrics["domain_excess"] = domain_statistics(excess, batch).loss
        if routing:
            metrics |= {name: jnp.mean(routing[name]) for name in ("router_balancing_loss", "router_z_loss")}
            slots = jnp.sum(routing["slots"], axis=0)
            metrics["domain_router_load"] = slots / jnp.maximum(jnp.sum(slots, axis=1, keepdims=True), 1.0)
        if batch is not drawn:
            metrics["domain_kept"] = _rows_of_domains(batch) / _rows_of_domains(drawn)
        return TrainState(state.step + 1, params, opt_state, mixer, state.weighters, state.key), metrics

    def _observed(self, state: TrainState, batch: Batch, forward: Forward) -> PyTree:
        """The mixer's state after it has seen the batch's losses."""
        step = state.step + 1
        statistics = domain_statistics(forward.token_losses, batch)
        schedule = self.mixer.schedule
        observation = Observation(
            step=step,
            steps_since_warmup=step - schedule.warmup_step,
            update=schedule.update_index(step),
            key=state.key,
            drawn_with=batch.drawn_with,
            domain_loss=statistics.loss,
            domain_rows=statistics.rows,
            domain_tokens=statistics.tokens,
            token_losses=forward.token_losses,
            mask=batch.mask,
            domains=batch.domain,
            reference_losses=forward.reference_losses,
        )
        return self.mixer.policy.update(state.mixer, observation)

    def _gradients(self, state: TrainState, fixed: Fixed, batch: Batch, row_keys: PRNGKeyArray):
        """((loss, (Forward, Weights, routing losses)), gradients) of the weighted sum of the token losses."""
        # Routing losses are of a microbatch; where the losses of microbatches are summed, each has its share.
        share = 1.0 if self.weigh_microbatches else 1.0 / self.grad_accumulation

        def objective_of(params, rows, row_keys, weights=None):
            if weights is None and self._weights_are_known:
                weights = self._weights(state, rows, _no_forward(rows))
            loss, forward, routing = self._forward(params, fixed, rows, row_keys, weights)
            if loss is None:
                weights = self._weights(state, rows, jax.lax.stop_gradient(forward))
                loss = jnp.sum(weights.tokens * forward.token_losses)
            if routing:
                loss += share * self._balance(routing)
            return loss, (forward, weights, routing)

        gradients = jax.value_and_grad(objective_of, has_aux=True)
        if self.grad_accumulation == 1:
            return gradients(state.params, batch, row_keys)

        microbatches = split((batch.rows_alone(), row_keys), self.grad_accumulation)
        weights = None if self.weigh_microbatches else self._batch_weights(state, fixed, batch, microbatches)

        def add(total, microbatch):
            (rows, keys), weights = microbatch
            rows = dataclasses.replace(rows, drawn_with=batch.drawn_with)
            (loss, aux), grads = gradients(state.params, rows, keys, weights)
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), aux = jax.lax.scan(add, zero, (microbatches, split(weights, self.grad_accumulation)))
        if self.weigh_microbatches:
            loss, grads = jax.tree.map(lambda x: x / self.grad_accumulation, (loss, grads))
        return (loss, joined(aux)), grads

    def _batch_weights(
        self, state: TrainState, fixed: Fixed, batch: Batch, microbatches: tuple[Batch, PRNGKeyArray]
    ) -> Weights:
        """The weights of the whole batch, after a forward pass over its microbatches where they depend on losses."""
        if self._weights_are_known:
            return self._weights(state, batch, _no_forward(batch))

        def of_part(part):
            rows, keys = part
            rows = dataclasses.replace(rows, drawn_with=batch.drawn_with)
            return self._forward(state.params, fixed, rows, keys)[1]

        forward = jax.lax.map(of_part, microbatches)
        return self._weights(state, batch, joined(forward))

    @property
    def _weights_are_known(self) -> bool:
        """Whether no policy's weights of the tokens depend on the forward pass."""
        return not self.weighters and self.mixer.policy.loss_weights is None

    def _forward(
        self, params: PyTree, fixed: Fixed, rows: Batch, row_keys: PRNGKeyArray, weights: Weights | None = None
    ) -> tuple[Float[Array, ""] | None, Forward, dict[str, Float[Array, "1 ..."]]]:
        """(the loss where there are weights, by-products, of a mixture of experts its routers' losses and each domain's
        slots in the last block)."""
        model = self.model.having(params, fixed.frozen)
        whole = objective.embeds_whole(self.weighters)
        seen = rows.with_last_inputs() if whole else rows
        top_k, real = model.config.num_experts_per_tok, seen.real_inputs
        hooks = Hooks(
            dropout_keys=row_keys,
            written_out=not model.config.scan_layers,
            all_trained=model.frozen is None,
            frozen_head=model.head_is_frozen,
            token_weights=None if weights is None else _padded(weights.tokens, seen),
            of_router=None if top_k is None else router_sums(top_k, real, rows.domain, rows.drawn_with.shape[0]),
        )
        losses, hidden, aux, loss = model.token_losses(seen, hooks)
        if whole:
            losses = losses[:, :-1]
        reference = rows.reference_losses
        if reference is None and fixed.reference is not None:
            reference = jax.lax.stop_gradient(fixed.reference.token_losses(rows).losses)
        routing = {}
        if "of_router" in aux:
            sums, tokens = aux["of_router"], jnp.sum(real)
            routing = {
                "router_balancing_loss": balancing_loss(sums, tokens),
                "router_z_loss": z_loss(sums, tokens),
                "slots": sums.slots[-1],
            }
        forward = Forward(losses, objective.embeddings(self.weighters, hidden, rows), reference)
        return loss, forward, {name: value[None] for name, value in routing.items()}

    def _balance(self, routing: dict[str, Float[Array, "1 ..."]]) -> Float[Array, ""]:
        """What the routers' losses add to the loss."""
        config = self.model.config
        balancing = config.router_aux_loss_coef * routing["router_balancing_loss"]
        return jnp.sum(balancing + config.router_z_loss_coef * routing["router_z_loss"])

    def _weights(self, state: TrainState, rows: Batch, forward: Forward) -> Weights:
        policy, mixer = self.mixer.policy, state.mixer
        if policy.loss_weights is not None and not (self.weigh_microbatches and self.grad_accumulation > 1):
            mixer = self._observed(state, rows, forward)
        return objective.weigh(policy, self.weighters, mixer, state.weighters, rows, forward, state.step + 1, state.key)


class DomainStatistics(NamedTuple):
    """Per domain over a batch: token-mean loss (0 where it has no token), rows, tokens that count; each [K]."""

    loss: Float[Array, " K"]
    rows: Int[Array, " K"]
    tokens: Float[Array, " K"]


def domain_statistics(
    token_losses: Float[Array, "B T"], batch: Batch, num_domains: int | None = None
) -> DomainStatistics:
    """Credits every row's losses to the row's own domain.

    Args:
        token_losses: of the batch.
        batch: whose mask and domains are read.
        num_domains: K; None: as many as the batch's proportions are for.
    """
    num_domains = batch.drawn_with.shape[0] if num_domains is None else num_domains
    row_tokens = batch.row_tokens
    # A masked sum, not a matrix product, which GPUs would round to TF32.
    member = batch.domain[:, None] == jnp.arange(num_domains)
    tokens = jnp.sum(member * row_tokens[:, None], axis=0)
    nll = jnp.sum(member * jnp.sum(batch.mask * token_losses, axis=1)[:, None], axis=0)
    rows = jnp.sum(member & (row_tokens > 0)[:, None], axis=0)
    return DomainStatistics(nll / jnp.maximum(tokens, 1.0), rows, tokens)


def _no_forward(rows: Batch) -> Forward:
    """For weights that do not depend on it."""
    return Forward(jnp.zeros_like(rows.mask), (), None)


def _padded(weights: Float[Array, "B T"], seen: Batch) -> Float[Array, "B seen"]:
    """With weights of 0 for the inputs that are read beyond those of the losses."""
    return jnp.pad(weights, ((0, 0), (0, seen.tokens.shape[1] - 1 - weights.shape[1])))


def _rows_of_domains(batch: Batch) -> Int[Array, " K"]:
    return jnp.sum(batch.domain[:, None] == jnp.arange(batch.drawn_with.shape[0]), axis=0)


def dropout_keys(key: PRNGKeyArray, step: Int[Array, ""], rows: int) -> PRNGKeyArray:
    """One key [rows] for each row of the step's batch.

    They depend on the run's key, the step and the row's place in the global batch, so microbatches and devices do not
    change a row's dropout.
    """
    # Policies fold steps into the run's key; none of them reaches this number.
    stream = jax.random.fold_in(key, jnp.uint32(2**32 - 1))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(stream, step), jnp.arange(rows))
