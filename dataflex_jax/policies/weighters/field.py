"""Weights that the data's records have: what somebody else has found each row or turn to be worth."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dataflex_jax.policies import RecordNumbers, RowObservation, Weighter, options, register_weighter

OF = ("record", "turns")


@register_weighter("field")
def field(*, field: str = "weight", of: str = "record") -> Weighter:
    """Weighs each row, or each turn of the assistant's, by a number >= 0 in its record; 1 where there is none.

    * "record": of the B rows with a token in the loss row b has weight `B u_b / sum(u)`, u the records' numbers.
    * "turns": of the n tokens in the loss token t has weight `n u_t / sum(u)`, u the numbers of the messages that the
      tokens belong to. A message with 0 is context only. Alone, the loss is the mean over the tokens, so weighted.

    Args:
        field: of a record (dotted where it lies in an object), or key of a message.
        of: "record" or "turns".

    Raises:
        ValueError: a hyperparameter out of its range.
    """
    options.require("field", field, field.strip() != "", "the name of a field")
    options.one_of("of", of, OF)

    def weigh(state: tuple, observation: RowObservation) -> Float[Array, "B *T"]:  # noqa: F821 - a shape
        counted = (observation.mask > 0).astype(jnp.float32)
        numbers = observation.record_numbers * counted
        if of == "record":
            numbers, counted = jnp.max(numbers, axis=1), jnp.max(counted, axis=1)
        total = jnp.sum(numbers)
        return numbers * (jnp.sum(counted) / jnp.where(total > 0, total, 1.0))

    return Weighter(init=lambda width: (), weigh=weigh, records=RecordNumbers(field, of))
