"""A policy's hyperparameters: what refuses impossible values, and groups of them that several policies share.

Every refusal is a `ValueError` that begins with `NAME = VALUE: `. `registry.checked` makes it a line about the policy's
section of the configuration, so that no policy needs to know where its hyperparameters come from.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from dataflex_jax.errors import shown

LARGEST_INT = 2**31 - 1  # of int32
LARGEST_NUMBER = 3.4e38  # of float32, about


def refuse(name: str, value: Any, reason: str) -> NoReturn:
    """Raises the `ValueError` of a hyperparameter with a value that cannot be."""
    raise ValueError(f"{name} = {shown(value)}: {reason}")


def is_refusal(error: BaseException) -> bool:
    """Whether an error refuses a hyperparameter: a `ValueError` that begins with its name and value."""
    return isinstance(error, ValueError) and re.match(r"\w+ = ", str(error)) is not None


def require(name: str, value: Any, holds: bool, accepted: str) -> None:
    """Refuses a value unless `holds`; `accepted` completes "must be".

    Raises:
        ValueError: names the hyperparameter.
    """
    if not holds:
        refuse(name, value, f"must be {accepted}")


def is_integer(value: Any) -> bool:
    """Whether it is a whole number that int32 holds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT


def is_number(value: Any) -> bool:
    """Whether it is a finite number that float32 holds; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


class _Type(NamedTuple):
    one: str
    several: str
    holds: Callable[[Any], bool]


_TYPES = {
    bool: _Type("True or False", "True or False", lambda value: isinstance(value, bool)),
    int: _Type("a 32-bit integer", "32-bit integers", is_integer),
    float: _Type("a finite 32-bit number", "finite 32-bit numbers", is_number),
    str: _Type("a string", "strings", lambda value: isinstance(value, str)),
    types.NoneType: _Type("None", "None", lambda value: value is None),
}


def of_type(name: str, value: Any, annotation: Any) -> None:
    """Refuses what is not as the hyperparameter's annotation says; integers are int32, numbers finite and float32.

    Args:
        name: of the hyperparameter.
        value: its value.
        annotation: of bool, int, float, str, tuple, tuple[T, ...], tuple[T, T], None and unions of them; others accept
            anything.

    Raises:
        ValueError: names the hyperparameter.
    """
    accepted = _type(annotation)
    require(name, value, accepted.holds(value), accepted.one)


def _type(annotation: Any) -> _Type:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _any_of([_type(part) for part in parts])
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        of = _type(parts[0])
        return _sequence(f"of {of.several}", lambda value: all(map(of.holds, value)))
    if origin is tuple:
        each = [_type(part) for part in parts]
        words = f"({', '.join(part.one for part in each)})"
        return _sequence(
            words,
            lambda value: len(value) == len(each) and all(of.holds(item) for of, item in zip(each, value, strict=True)),
        )
    if annotation is tuple:
        return _sequence("", lambda value: True)
    return _TYPES.get(annotation, _Type("anything", "anything", lambda value: True))


def _sequence(words: str, holds: Callable[[Any], bool]) -> _Type:
    return _Type(
        f"a tuple {words}".rstrip(),
        f"tuples {words}".rstrip(),
        lambda value: isinstance(value, tuple | list) and holds(value),
    )


def _any_of(accepted: Sequence[_Type]) -> _Type:
    *others, last = (each.one for each in accepted)
    words = f"{', '.join(others)} or {last}"
    return _Type(words, words, lambda value: any(each.holds(value) for each in accepted))


def one_of(name: str, value: Any, accepted: Sequence[str]) -> None:
    """Refuses what is none of the accepted names.

    Raises:
        ValueError: names the hyperparameter.
    """
    require(name, value, value in accepted, f"one of {', '.join(accepted)}")


def at_least(name: str, value: float, low: float) -> None:
    """Refuses a number below `low`.

    Raises:
        ValueError: names the hyperparameter.
    """
    require(name, value, value >= low, f">= {low}")


def positive(name: str, value: float) -> None:
    """Refuses a number that is not above 0.

    Raises:
        ValueError: names the hyperparameter.
    """
    require(name, value, value > 0, "> 0")


def between(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Refuses a number outside an interval, whose ends belong to it unless they are open.

    Raises:
        ValueError: names the hyperparameter.
    """
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    require(name, value, inside, f"in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}")


def including(group: type, *, without: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a group of shared hyperparameters to a factory's own; the factory gets the group as its one argument.

        @register_order("folding")
        @options.including(ScoreOptions)
        def folding(shared: ScoreOptions, *, L: int = 5) -> Order: ...

        folding(L=3, jitter=8)

    Args:
        group: a dataclass with keyword-only fields, all of which have a default; it refuses impossible values when it
            is made.
        without: fields that the factory does not offer; they keep their defaults.
    """
    shared = [field for name, field in inspect.signature(group).parameters.items() if name not in without]
    names = {field.name for field in shared}

    def decorate(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def build(**given: Any) -> Any:
            own = {name: value for name, value in given.items() if name not in names}
            return factory(group(**{name: given[name] for name in names & given.keys()}), **own)

        signature = inspect.signature(factory)
        _, *own = signature.parameters.values()
        build.__signature__ = signature.replace(parameters=[*own, *shared])
        return build

    return decorate
