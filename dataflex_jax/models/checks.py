"""What a field of a model's configuration accepts, refused in one line."""

from collections.abc import Collection
from typing import Any

from dataflex_jax.errors import InputError, one_line

# What the devices hold: int32 and float32.
MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 3.4e38


def check_positive(name: str, value: Any, kind: type, most: int = MAX_INTEGER) -> None:
    """Refuses what is no positive integer up to `most` (`kind` int) or no positive number (float).

    Raises:
        InputError: names the field.
    """
    if kind is int:
        accepted = f"a positive integer up to {most}"
        good = isinstance(value, int) and 0 < value <= most
    else:
        accepted = "a positive number"
        good = isinstance(value, int | float) and 0 < value <= MAX_NUMBER
    if isinstance(value, bool) or not good:
        raise InputError(f"model {name}={shown(value)}: must be {accepted}")


def check_not_negative(name: str, value: Any) -> None:
    """Refuses what is no number from 0 on.

    Raises:
        InputError: names the field.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
        raise InputError(f"model {name}={shown(value)}: must be a number >= 0")


def check_choice(name: str, value: Any, accepted: Collection[Any]) -> None:
    """Refuses what is not among the accepted values.

    Raises:
        InputError: names the field and what is accepted.
    """
    if value not in accepted:
        names = ", ".join(repr(a) for a in accepted)
        raise InputError(f"model {name}={shown(value)} is not supported; accepted: {names}")


def check_bool(name: str, value: Any) -> None:
    """Refuses what is neither True nor False; a text "false" would count as true.

    Raises:
        InputError: names the field.
    """
    if not isinstance(value, bool):
        raise InputError(f"model {name}={shown(value)}: must be true or false")


def shown(value: Any) -> str:
    """A value for a message, which may be any that a file holds."""
    return one_line(repr(value), 100)
