"""How each kind of signal is computed of a batch; `policies.signals` has the kinds that come with the project.

A signal of one's own is a small hashable value and a function that is registered for its type:

    @dataclasses.dataclass(frozen=True)
    class Surprise:
        order: int = 2

    @register_signal(Surprise)
    def surprise(signal):
        def of_rows(subject, batch, operand):
            return jnp.mean(subject.model.token_losses(batch).losses ** signal.order, axis=1)

        return of_rows

`of_rows` is pure and traced into a sweep; what it returns has the batch's rows as leading axis, and a row's result must
not depend on the other rows, nor on how far the row is padded.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import PyTree

from dataflex_jax.data.batch import Batch
from dataflex_jax.errors import InputError, shown
from dataflex_jax.models.model import Model
from dataflex_jax.policies.contract import check_signal, takes
from dataflex_jax.signals.moments import AdamState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subject:
    """What a signal is asked of.

    Attributes:
        model: with its parameters.
        adam: the optimizer's state and constants; None where there is none.
    """

    model: Model
    adam: AdamState | None = None


RowFunction = Callable[[Subject, Batch, PyTree], PyTree]

_MAKERS: dict[type, Callable[[Any], RowFunction]] = {}


def register_signal(kind: type) -> Callable[[Callable[[Any], RowFunction]], Callable[[Any], RowFunction]]:
    """Registers the function that makes, of a signal of type `kind`, the function of (subject, batch, operand).

    Raises:
        ValueError: another one is registered.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Inputs:
    ...     "The number of inputs of each row."
    >>> @df.register_signal(Inputs)
    ... def inputs(signal):
    ...     return lambda subject, batch, operand: batch.lengths
    >>> model, tokenizer = df.example()
    >>> df.sweep(model, df.rows(["Ada", "Grace"], tokenizer), Inputs()).tolist()
    [3, 5]
    """

    def add(make: Callable[[Any], RowFunction]) -> Callable[[Any], RowFunction]:
        known = _MAKERS.get(kind)
        if known is not None and known.__module__ != make.__module__:
            raise ValueError(f"{kind.__name__}: {known.__module__} has registered how it is computed already")
        _MAKERS[kind] = make
        return make

    return add


# Typed, because named tuples of different types are equal where their fields are.
@functools.lru_cache(maxsize=None, typed=True)
def row_function(signal: Hashable) -> Callable[[tuple[Subject, PyTree], Batch], PyTree]:
    """The function ((subject, operand), batch) of a signal, always the same object, so that it is compiled once.

    Raises:
        ValueError: nobody has registered its type.
        InputError: what is registered makes no function of three arguments; from the function, what it returns does
            not say something of each row.
    """
    if type(signal) not in _MAKERS:
        known = ", ".join(sorted(kind.__name__ for kind in _MAKERS))
        raise ValueError(f"{type(signal).__name__}: no signal of this type is registered; there are {known}")
    make = _MAKERS[type(signal)](signal)
    if not takes(make, 3):
        raise InputError(
            f"signal {type(signal).__name__!r}: what makes its function returned {shown(make)}; a function of "
            "(subject, batch, operand) is expected"
        )

    def of_rows(operands: tuple[Subject, PyTree], batch: Batch) -> PyTree:
        subject, operand = operands
        result = make(subject, batch, operand)
        check_signal(signal, result, batch.num_rows)
        return result

    return of_rows
