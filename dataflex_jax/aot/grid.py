"""Many variants of a configuration, one estimate each: which fit, and which of them is fastest."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from dataflex_jax.aot.estimate import Estimate
from dataflex_jax.errors import InputError

_REASON = 160  # characters


class Tried(NamedTuple):
    """A variant.

    Attributes:
        fields: what it has otherwise, by dotted name.
        estimate: None where there is none.
        reason: why there is none.
    """

    fields: Mapping[str, Any]
    estimate: Estimate | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields, of paths the last part, and the estimate or the reason."""
        fields = {name: str(v).rpartition("/")[2] if isinstance(v, str) else v for name, v in self.fields.items()}
        return {"fields": fields} | ({"reason": self.reason} if self.estimate is None else self.estimate.to_json())


def having(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """A copy of a configuration with other values, by dotted name.

    Raises:
        InputError: there is no such field.
    """
    copy = config.copy_and_resolve_references()
    for name, value in fields.items():
        try:
            copy.update_from_flattened_dict({name: value})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{name}={value!r}: {error}") from error
    return copy


def variants(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each name."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def tried(estimate_of: Callable[[Mapping[str, Any]], Estimate], fields: Sequence[Mapping[str, Any]]) -> list[Tried]:
    """The estimates of some variants; one that is refused or cannot be compiled has the reason in its place.

    Args:
        estimate_of: fields -> the estimate.
        fields: of each variant.
    """

    def one(each: Mapping[str, Any]) -> Tried:
        try:
            return Tried(each, estimate_of(each))
        except Exception as error:  # whatever it is, its row says it
            return Tried(each, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON])

    return [one(each) for each in tqdm(fields, desc="compiling", unit="programs")]


def best_of_each(rows: Sequence[Tried], names: Sequence[str]) -> list[Tried]:
    """Of the variants with the same values of these fields, the one that fits with the most tokens a second.

    Args:
        rows: the variants.
        names: of fields; those that no variant has are passed over.
    """
    chosen: dict[tuple, Tried] = {}
    for row in rows:
        if row.estimate is None or not row.estimate.fits:
            continue
        group = tuple(row.fields.get(name) for name in names)
        if group not in chosen or row.estimate.tokens_per_second > chosen[group].estimate.tokens_per_second:
            chosen[group] = row
    return list(chosen.values())
