"""What a field of a model's configuration accepts, refused in one line."""

from collections.abc import Collection
from typing import Any

from dataflex_jax.errors import InputError


def check_positive(name: str, value: Any, kind: type) -> None:
    """Refuses what is no positive integer (`kind` int) or no positive number (float).

    Raises:
        InputError: names the field.
    """
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or value <= 0:
        raise InputError(f"model {name}={value!r}: must be a positive {'integer' if kind is int else 'number'}")


def check_choice(name: str, value: Any, accepted: Collection[Any]) -> None:
    """Refuses what is not among the accepted values.

    Raises:
        InputError: names the field and what is accepted.
    """
    if value not in accepted:
        names = ", ".join(repr(a) for a in accepted)
        raise InputError(f"model {name}={value!r} is not supported; accepted: {names}")
