"""Who is trained together: models that differ by their seed, their mixture or the rows that they see."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dataflex_jax.data.pool import Group
from dataflex_jax.errors import InputError


class Member(NamedTuple):
    """One of the models; everything else is the configuration's.

    Attributes:
        name: for people, such as "subset 3".
        seed: of its weights, its draws and shuffles, and its policies, as `config.seed`.
        proportions: of the domains at the start, as `config.data.proportions`; None: the configuration's.
        rows: the pool's rows that it trains on, increasing; None: all.
    """

    name: str
    seed: int
    proportions: Float64[np.ndarray, " K"] | None = None
    rows: Int64[np.ndarray, " n"] | None = None

    def identity(self) -> dict[str, Any]:
        """What tells it from others, in JSON."""
        return {
            "name": self.name,
            "seed": self.seed,
            "proportions": None if self.proportions is None else np.asarray(self.proportions, np.float64).tolist(),
            "rows": None if self.rows is None else hashlib.blake2b(self.rows.astype("<i8"), digest_size=16).hexdigest(),
        }

    def rows_by_group(self, groups: Sequence[Group]) -> tuple[Int64[np.ndarray, " n"], ...] | None:
        """Its rows in each of the groups that a sampler draws from; None: all of them.

        Raises:
            InputError: a group without any.
        """
        if self.rows is None:
            return None
        bounds = np.searchsorted(self.rows, [(group.start, group.stop) for group in groups])
        parts = tuple(np.asarray(self.rows[start:stop], np.int64) for start, stop in bounds)
        for group, part in zip(groups, parts, strict=True):
            if len(part) == 0:
                raise InputError(f"{self.name}: none of its {len(self.rows)} rows is of {group.name!r}; give it more")
        return parts
