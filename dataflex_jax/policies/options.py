"""A policy's hyperparameters: what refuses impossible values, and groups of them that several policies share.

Every refusal is a `ValueError` that begins with `NAME = VALUE: `. `registry.checked` makes it a line about the policy's
section of the configuration, so that no policy needs to know where its hyperparameters come from.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def refuse(name: str, value: Any, reason: str) -> NoReturn:
    """Raises the `ValueError` of a hyperparameter with a value that cannot be."""
    raise ValueError(f"{name} = {value!r}: {reason}")


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
