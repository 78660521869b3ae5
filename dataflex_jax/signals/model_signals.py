"""The signals that come with the project, as functions of a model and a batch; see `policies.signals`."""

import jax.numpy as jnp

from dataflex_jax.errors import InputError
from dataflex_jax.models.moe import loads
from dataflex_jax.policies import options
from dataflex_jax.policies.signals import (
    LAYERS,
    PARAMETERS,
    Alignments,
    Embeddings,
    GateLoads,
    GradientNorms,
    Gradients,
    Influences,
    Losses,
    Preconditioner,
)
from dataflex_jax.signals.directions import beside
from dataflex_jax.signals.gradients import directional_derivatives, gradient_features, gradient_norms
from dataflex_jax.signals.moments import Moments
from dataflex_jax.signals.registry import RowFunction, Subject, register_signal
from dataflex_jax.signals.rows import select_of


@register_signal(Losses)
def losses(signal: Losses) -> RowFunction:
    """Token-mean losses."""
    del signal

    def of_rows(subject, batch, operand):
        tokens = batch.row_tokens
        token_losses = subject.model.token_losses(batch).losses
        return jnp.where(tokens > 0, jnp.sum(batch.mask * token_losses, axis=1) / tokens, jnp.nan)

    return of_rows


@register_signal(Embeddings)
def embeddings(signal: Embeddings) -> RowFunction:
    """One vector a row of its last hidden states, or of those of each of some layers, and what is wanted of it."""

    def of_rows(subject, batch, operand):
        seen = batch.with_last_inputs() if signal.whole else batch
        real = seen.real_inputs
        if signal.layers is None:
            found = signal.embed(subject.model.hidden_states(seen), real)
        else:
            numbers = layer_numbers(signal.layers, subject.model.config.num_hidden_layers)
            found = subject.model.of_layers(seen, numbers, lambda hidden: signal.embed(hidden, real))
            found = jnp.stack(found, axis=1)
        return found if signal.then is None else signal.then(found, operand)

    return of_rows


@register_signal(GateLoads)
def gate_loads(signal: GateLoads) -> RowFunction:
    """Tokens of each row that the experts get."""
    options.one_of("layers", signal.layers, LAYERS)

    def of_rows(subject, batch, operand):
        model, real = subject.model, batch.real_inputs
        found = model.of_routers(batch, lambda logits: loads(logits, model.config.num_experts_per_tok, real))
        return found[-1] if signal.layers == "last" else jnp.swapaxes(found, 0, 1)

    return of_rows


def layer_numbers(layers: tuple[int, ...] | int, available: int) -> list[int]:
    """The numbers, from 1, of the layers that `Embeddings` means in a model that has so many.

    Raises:
        InputError: one that there is not.
    """
    if isinstance(layers, int):
        count = min(layers, available)
        return [i * (available + 1) // (count + 1) for i in range(1, count + 1)]
    for number in layers:
        if not 1 <= abs(number) <= available:
            raise InputError(
                f"layer {number} is asked for, but the model has {available}; layers from 1 to {available}, or from -1 "
                f"(the last) to -{available}, are accepted"
            )
    return [number if number > 0 else available + 1 + number for number in layers]


@register_signal(Gradients)
def gradients(signal: Gradients) -> RowFunction:
    """Projected gradients, and what is wanted of them."""
    options.one_of("parameters", signal.parameters, PARAMETERS)
    features = gradient_features(signal.projection, parameters=select_of(signal.parameters))

    def of_rows(subject, batch, operand):
        found = features(subject.model, batch, _moments(subject, signal.adam))
        return found if signal.then is None else signal.then(found, operand)

    return of_rows


def _moments(subject: Subject, adam: Preconditioner | None) -> Moments | None:
    if adam is None:
        return None
    if subject.adam is None:
        raise InputError(
            "there is no Adam state to precondition the gradients with: give a run's checkpoint, which has "
            'one, or take the plain gradients (gradient_type "sgd" of a selector)'
        )
    return subject.adam.moments(adam)


@register_signal(Influences)
def influences(signal: Influences) -> RowFunction:
    """Gradients along directions."""

    def of_rows(subject, batch, operand):
        moments = _moments(subject, signal.adam)
        found = beside(subject.model, batch, tuple(operand), operand, moments).influences
        return found if signal.then is None else signal.then(found)

    return of_rows


@register_signal(GradientNorms)
def norms(signal: GradientNorms) -> RowFunction:
    """Norms of the gradients."""
    options.one_of("parameters", signal.parameters, PARAMETERS)
    of_batch = gradient_norms(parameters=select_of(signal.parameters))
    return lambda subject, batch, operand: of_batch(subject.model, batch)


@register_signal(Alignments)
def alignments(signal: Alignments) -> RowFunction:
    """Inner products of the gradients with directions."""
    del signal
    return lambda subject, batch, operand: directional_derivatives(subject.model, batch, operand)
