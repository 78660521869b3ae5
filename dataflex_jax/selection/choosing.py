"""From a selector's evidence to the chosen rows: non-finite candidates out, group by group, too small a pool said."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int64

from dataflex_jax.data.pool import Group, Pool
from dataflex_jax.errors import TrainingError
from dataflex_jax.files import replace_file
from dataflex_jax.policies.base import Choice, Evidence, Request, Selector
from dataflex_jax.policies.contract import check_evidence, check_ids
from dataflex_jax.policies.schedule import Scheduled
from dataflex_jax.policies.signals import Signals

logger = logging.getLogger(__name__)


def share_of(share: float, rows: int) -> int:
    """How many rows a share of them is, at least one."""
    return max(1, round(share * rows))


class Chosen(NamedTuple):
    """What a selector chose in all groups.

    Attributes:
        ids: places in the pool, group by group in rank order.
        scores: theirs.
        all_scores: float32 [N]; NaN where something was not finite.
        groups: places of each group's part in `ids`.
        once: how many of each group's part are distinct choices; of too few candidates they come again after it.
        not_finite: candidates that were left out because their losses or gradients are not finite.
        by_group: of each target group, the scores of all candidates, where they were asked for.
    """

    ids: Int64[np.ndarray, " num"]
    scores: np.ndarray
    all_scores: np.ndarray
    groups: tuple[slice, ...]
    once: tuple[int, ...]
    not_finite: int
    by_group: Mapping[str, Float[np.ndarray, " N"]] | None = None


class Chooser:
    """Asks a selector for its choice.

    Args:
        selector: whose choice.
        pool: the candidates.
        groups: parts of the pool to choose from, each by itself.
    """

    def __init__(self, selector: Scheduled[Selector], pool: Pool, groups: Sequence[Group]):
        self._name, self._selector = selector.name, selector.policy
        self._pool, self._groups = pool, groups
        self._choose = jax.jit(self._selector.choose, static_argnums=2)
        self._said: set[str] = set()

    def choose(
        self,
        state: dict[str, Any],
        signals: Signals,
        request: Request,
        counts: Sequence[int],
        *,
        again: bool = True,
    ) -> tuple[Chosen, dict[str, Any]]:
        """The selector's choice of `counts[g]` rows of each group g, and its state after it.

        Args:
            state: of the selector.
            signals: of the current model.
            request: to the selector.
            counts: of the groups.
            again: whether of too few candidates each comes again; otherwise fewer are chosen.

        Raises:
            InputError: a choice that no window can be made of.
            TrainingError: a group without any finite candidate.
        """
        evidence, state = self._selector.score(state, signals, request)
        check_evidence(self._name, evidence, self._pool.num_rows)
        finite = np.ones(self._pool.num_rows, bool)
        for leaf in jax.tree.leaves(evidence.rows):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                finite &= np.isfinite(leaf).reshape(len(finite), -1).all(axis=1)
        all_scores = np.full(self._pool.num_rows, np.nan, np.float32)
        parts, scores, once = [], [], []
        for number, (group, count) in enumerate(zip(self._groups, counts, strict=True)):
            members = group.start + np.flatnonzero(finite[group.start : group.stop])
            part = jax.tree.map(lambda leaf, rows=members: np.asarray(leaf)[rows], evidence.rows)
            count = count if again else min(count, len(members))
            in_group = request._replace(key=jax.random.fold_in(request.key, number))
            choice = self._chosen(evidence._replace(rows=part), in_group, group, len(members), count)
            places = np.asarray(choice.ids)
            check_ids(self._name, places, len(members), replacement=self._selector.replacement)
            ids = members[places]
            all_scores[members] = choice.all_scores
            once.append(len(ids))
            repeats = np.arange(count) % len(ids)
            parts.append(ids[repeats])
            scores.append(np.asarray(choice.scores, np.float32)[repeats])
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        slices = tuple(slice(*ends[i : i + 2]) for i in range(len(parts)))
        not_finite = int((~finite).sum())
        if not_finite:
            message = f"{not_finite} of {len(finite)} candidates have losses or gradients that are not finite."
            self._say("not finite", message)
        return Chosen(np.concatenate(parts), np.concatenate(scores), all_scores, slices, tuple(once), not_finite), state

    def _chosen(self, evidence: Evidence, request: Request, group: Group, available: int, count: int) -> Choice:
        if available == 0:
            raise TrainingError(f"{group.name}: no candidate has a finite loss or gradient; nothing can be selected")
        if count > available and not self._selector.replacement:
            self._say(
                group.name,
                f"{group.name}: {count} examples wanted of {available}; each is taken once before any is taken again.",
            )
            count = available
        return self._choose(evidence, request, count)

    def _say(self, about: str, message: str) -> None:
        """Once: the figures change from update to update, and policy.jsonl has them."""
        if about not in self._said:
            logger.warning("%s: %s", self._name, message)
        self._said.add(about)


def described(chosen: Chosen, pool: Pool, before: Int64[np.ndarray, " m"] | None) -> dict[str, Any]:
    """What policy.jsonl says of a choice, as numbers and numbers by domain.

    Args:
        chosen: the choice.
        pool: the candidates.
        before: the ids of the choice before, in any order; None: there was none.
    """
    distinct = np.unique(chosen.ids)
    rows = np.bincount(pool.domain_of(chosen.ids), minlength=len(pool.domains))
    return {
        "selected": len(chosen.ids),
        "distinct": len(distinct),
        "not_finite": chosen.not_finite,
        "domain_share": {d.name: n / len(chosen.ids) for d, n in zip(pool.domains, rows, strict=True)},
        "overlap": None if before is None else np.isin(distinct, before).mean(),
        "score_min": chosen.scores.min(),
        "score_mean": chosen.scores.mean(dtype=np.float64),
        "score_max": chosen.scores.max(),
    }


def write_selection(path: Path, pool: Pool, chosen: Chosen, *, all_scores: bool) -> None:
    """Writes ids and scores (of the chosen, in rank order), their domains and lengths, the numbers of their records in
    the sources (of examples), how many candidates there are of each length, on request all scores, and those by target
    group where there are any."""
    arrays = {"ids": chosen.ids, "scores": chosen.scores, "domains": pool.domain_of(chosen.ids)}
    lengths = pool.lengths()
    arrays["lengths"] = lengths[chosen.ids]
    arrays["pool_lengths"], arrays["pool_rows"] = np.unique(lengths, return_counts=True)
    if (records := pool.records()) is not None:
        arrays["records"] = records[chosen.ids]
    if all_scores:
        arrays["all_scores"] = chosen.all_scores
    if chosen.by_group is not None:
        arrays["group_scores"] = np.stack(list(chosen.by_group.values()), axis=1)
        arrays["groups"] = np.array(list(chosen.by_group))
    file = io.BytesIO()
    np.savez(file, **arrays)
    replace_file(path, file.getvalue())
