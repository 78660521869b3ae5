"""`data.max_epochs`: how many rows each domain may give in a run."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float

from dataflex_jax.errors import InputError
from dataflex_jax.policies.options import LARGEST_INT

# One number, one a domain, or (name, number) pairs.
MaxEpochs = float | tuple[float, ...] | tuple[tuple[str, float], ...] | None

_OPTION = "data.max_epochs"


def most_rows(
    max_epochs: MaxEpochs, rows: Mapping[str, int], proportions: Float[np.ndarray, " K"]
) -> tuple[int, ...] | None:
    """How many rows each domain gives at most; None: there is no limit.

    Args:
        max_epochs: `config.data.max_epochs`.
        rows: of each of the K domains.
        proportions: the run's; a domain at 0 gives none.

    Raises:
        InputError: not one number for each domain, other names than theirs, or less than a row of one.
    """
    if max_epochs is None:
        return None
    epochs = _by_name(max_epochs, list(rows))
    most = []
    for (name, count), share in zip(rows.items(), proportions, strict=True):
        limit = math.floor(Fraction(str(epochs[name])) * count) if name in epochs else LARGEST_INT
        if limit < 1:
            reason = f"{epochs[name]:g} epochs of the {count} rows of {name} are no row"
            raise InputError(reason, option=_OPTION, value=max_epochs)
        most.append(limit if share > 0 else 0)
    return tuple(most)


def check_room(max_epochs: MaxEpochs, most: Sequence[int], needed: int) -> None:
    """Refuses a run of more rows than its domains may give.

    Args:
        max_epochs: `config.data.max_epochs`.
        most: rows of each domain.
        needed: rows of the run.

    Raises:
        InputError: says how many there are.
    """
    if sum(most) < needed:
        reason = f"the domains give at most {sum(most)} rows, and the run needs {needed} in its steps"
        raise InputError(f"{reason}; raise it, or train for fewer steps", option=_OPTION, value=max_epochs)


def _by_name(max_epochs: MaxEpochs, names: Sequence[str]) -> dict[str, float]:
    if not isinstance(max_epochs, tuple | list):
        return dict.fromkeys(names, max_epochs)
    if isinstance(max_epochs[0], tuple | list):
        found = dict(max_epochs)
        if unknown := [name for name in found if name not in names]:
            raise InputError(f"{unknown[0]!r} is none of the domains {', '.join(names)}", option=_OPTION)
        return found
    if len(max_epochs) != len(names):
        reason = f"has {len(max_epochs)} entries; one for each of the {len(names)} domains is needed"
        raise InputError(reason, option=_OPTION, value=max_epochs)
    return dict(zip(names, max_epochs, strict=True))
