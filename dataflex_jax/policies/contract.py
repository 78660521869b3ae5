"""What a policy's functions must return, checked where a run calls them: users write policies too.

Shapes, dtypes and structure are checked while a function is traced, so that a step costs nothing more, and values where
the host has them anyway. Every refusal names the policy, the function, what it returned and what is expected.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dataflex_jax.errors import InputError, one_line, shown
from dataflex_jax.policies.base import LOSS_MEANS, SCORE_KINDS, Choice, Evidence, Mixer, Order, Selector, Weighter
from dataflex_jax.policies.schedule import Scheduled
from dataflex_jax.policies.signals import TARGETS
from dataflex_jax.policies.user_code import user_code

_TOLERANCE = 1e-3  # of a distribution's sum: float32, or even bfloat16, over many domains
# What a field of a protocol must be beyond its type, by name: in words, and as a predicate.
_FURTHER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "every": ("an integer >= 0", lambda value: value >= 0),
    "oversample": ("an integer >= 2", lambda value: value >= 2),
    "target_rows": ("an integer >= 0", lambda value: value >= 0),
    "loss_mean": (f"one of {', '.join(LOSS_MEANS)}", lambda value: value in LOSS_MEANS),
    "refresh_interval": ("an integer >= 1", lambda value: value >= 1),
    "scores": (f"a ScoreSource of {', '.join(SCORE_KINDS)}", lambda value: value.kind in SCORE_KINDS),
}


def check_fields(who: str, made: NamedTuple) -> None:
    """Refuses a policy, or what else is a NamedTuple of functions, whose fields are not what its class says they are.

    Args:
        who: it is, such as "mixer 'mine'".
        made: by a factory of the user's.

    Raises:
        InputError: a function that is missing or takes another number of arguments, or another wrong field.
    """
    for field, annotation in type(made).__annotations__.items():
        value = getattr(made, field)
        wanted = _unfit(value, annotation)
        if wanted is None and field in _FURTHER and not _FURTHER[field][1](value):
            wanted = _FURTHER[field][0]
        if wanted is not None:
            raise InputError(f"{who}: {field} is {_shown(value)}; expected {wanted}")
    if isinstance(made, Selector) and (made.score is None) != (made.choose is None):
        raise InputError(f"{who}: one of score and choose is None; expected both to be, or none")
    if isinstance(made, Selector) and made.online is not None:
        if made.score is not None:
            raise InputError(f"{who}: has both score and online; expected one, it chooses between steps or inside them")
        check_fields(f"{who}: online", made.online)
        if made.online.target_rows and TARGETS not in made.needs:
            raise InputError(f"{who}: online.target_rows is {made.online.target_rows}; needs must have TARGETS then")


def _unfit(value: Any, annotation: Any) -> str | None:
    """What a value should be by an annotation, where it is not."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    if value is None and types.NoneType in parts:
        return None
    kind = next(part for part in parts if part is not types.NoneType)
    or_none = ", or None" if types.NoneType in parts else ""
    if typing.get_origin(kind) is Callable:
        arguments, _ = typing.get_args(kind)
        number = len(arguments)
        return None if takes(value, number) else f"a function of {number} argument{'s'[: number != 1]}{or_none}"
    if typing.get_origin(kind) is frozenset:
        return None if isinstance(value, Collection) and not isinstance(value, str) else "a set"
    kinds = {int: (int, np.integer), bool: (bool, np.bool_)}.get(kind, kind)
    right = isinstance(value, kinds) and (kind is not int or not isinstance(value, bool))
    words = {int: "an integer", bool: "True or False", str: "a string"}.get(kind, f"a {kind.__name__}")
    return None if right else f"{words}{or_none}"


def takes(function: Any, number: int) -> bool:
    """Whether a function can be called with so many arguments, as far as it says."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some functions in C
        return True
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True


def _shown(value: Any) -> str:
    if not callable(value):
        return shown(value)
    try:
        return f"a function of {inspect.signature(value)}"
    except ValueError:
        return shown(value)


def checked_mixer(scheduled: Scheduled[Mixer], num_domains: int) -> Scheduled[Mixer]:
    """The mixer, its functions refusing what K domains cannot be drawn with.

    Raises:
        InputError: from these functions.
    """
    of = functools.partial(_checked, f"mixer {scheduled.name!r}")
    mixer = scheduled.policy

    def one_each(result: Any, *_: Any) -> str | None:
        return None if _is_real(result, (num_domains,)) else f"one number for each of {num_domains} domains"

    return scheduled._replace(
        policy=mixer._replace(
            init=of("init", mixer.init, _no_arrays),
            update=of("update", mixer.update, _other_state),
            sampling_weights=of("sampling_weights", mixer.sampling_weights, one_each),
            loss_weights=of("loss_weights", mixer.loss_weights, one_each),
            average=of("average", mixer.average, lambda result, _: one_each(result) or _proportions(result)),
            on_resume=of("on_resume", mixer.on_resume, lambda result, old, fresh: _other_state(result, fresh)),
            refresh=of("refresh", mixer.refresh, _other_state),
            log=of("log", mixer.log, _names),
        )
    )


def checked_weighter(scheduled: Scheduled[Weighter]) -> Scheduled[Weighter]:
    """The weighter, its functions refusing what no batch can be weighted with.

    Raises:
        InputError: from these functions.
    """
    of = functools.partial(_checked, f"weighter {scheduled.name!r}")
    weighter = scheduled.policy

    def weights(result: Any, state: PyTree, seen: Any) -> str | None:
        shapes = seen.losses.shape, seen.mask.shape
        if any(_is_real(result, shape) for shape in shapes):
            return None
        rows, tokens = (",".join(map(str, shape)) for shape in shapes)
        return f"a weight of each row, [{rows}], or of each token, [{tokens}]"

    def vectors(result: Any, hidden: Array, inputs: Array) -> str | None:
        right = _is_real(result) and len(result.shape) == 2 and result.shape[0] == hidden.shape[0]
        return None if right else f"a vector of each row, [{hidden.shape[0]}, E]"

    return scheduled._replace(
        policy=weighter._replace(
            init=of("init", weighter.init, _no_arrays),
            weigh=of("weigh", weighter.weigh, weights),
            embed=of("embed", weighter.embed, vectors),
            refresh=of("refresh", weighter.refresh, _other_state),
        )
    )


def checked_selector(scheduled: Scheduled[Selector]) -> Scheduled[Selector]:
    """The selector, its functions refusing what says nothing of each candidate.

    Raises:
        InputError: from these functions.
    """
    of = functools.partial(_checked, f"selector {scheduled.name!r}")
    selector = scheduled.policy

    def state_of(result: Any, *_: Any) -> str | None:
        return _no_arrays(result) if isinstance(result, dict) else "a dict of arrays"

    def pair(result: Any, *_: Any) -> str | None:
        right = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Evidence)
        if not right or not isinstance(result[1], dict):
            return "a pair: Evidence, and a dict of arrays as the state"
        return _no_arrays(result[1])

    def choice_of(result: Any, evidence: Evidence, request: Any, num: int) -> str | None:
        n = jax.tree.leaves(evidence.rows)[0].shape[0]
        right = isinstance(result, Choice) and (
            _is_array(result.ids, jnp.integer, (num,))
            and _is_real(result.scores, (num,))
            and _is_real(result.all_scores, (n,))
        )
        return None if right else f"a Choice of {num} ids, their {num} scores and the scores of all {n} candidates"

    def matrix(result: Any, signals: Any) -> str | None:
        shape = signals.candidates.num_rows, len(signals.targets.group_names)
        wanted = f"a number for each of {shape[0]} candidates and {shape[1]} target groups"
        return None if _is_real(result, shape) else wanted

    def places(result: Any, seen: Any, num: int) -> str | None:
        return None if _is_array(result, jnp.integer, (num,)) else f"the places of {num} rows, int[{num}]"

    online = selector.online
    return scheduled._replace(
        policy=selector._replace(
            online=online and online._replace(pick=of("online.pick", online.pick, places)),
            init=of("init", selector.init, state_of),
            score=of("score", selector.score, pair),
            choose=of("choose", selector.choose, choice_of),
            by_group=of("by_group", selector.by_group, matrix),
        )
    )


def checked_order(scheduled: Scheduled[Order]) -> Scheduled[Order]:
    """The order, refusing what is no permutation.

    Raises:
        InputError: from `arrange`.
    """

    def permutation(result: Any, scores: np.ndarray, key: Any) -> str | None:
        ids, n = np.asarray(result), len(scores)
        right = ids.shape == (n,) and ids.dtype.kind in "iu" and np.array_equal(np.sort(ids), np.arange(n))
        return None if right else f"a permutation of the numbers from 0 to {n - 1}"

    arrange = _checked(f"order {scheduled.name!r}", "arrange", scheduled.policy.arrange, permutation)
    return scheduled._replace(policy=scheduled.policy._replace(arrange=arrange))


def check_evidence(selector: str, evidence: Evidence, candidates: int) -> None:
    """Refuses evidence that does not say something of each candidate.

    Args:
        selector: its name.
        evidence: what its `score` returned.
        candidates: how many there are.

    Raises:
        InputError: names the selector.
    """
    if not _of_each(evidence.rows, candidates):
        raise InputError(
            f"selector {selector!r}: score returned {_described(evidence)}; expected evidence whose rows have an entry "
            f"for each of {candidates} candidates"
        )
    if wanted := _no_arrays(evidence.shared):
        raise InputError(f"selector {selector!r}: score returned {_described(evidence)}; expected as shared {wanted}")


def check_signal(signal: Hashable, result: PyTree, rows: int) -> None:
    """Refuses what a signal's function returned of a batch if it does not say something of each of its rows.

    Raises:
        InputError: names the signal's type.
    """
    if not _of_each(result, rows):
        raise InputError(
            f"signal {type(signal).__name__!r}: its function returned {_described(result)} of a batch of {rows} rows; "
            "expected arrays with an entry for each"
        )


def check_ids(selector: str, ids: Int[np.ndarray, " num"], candidates: int, *, replacement: bool) -> None:
    """Refuses a choice of candidates that there are not, or of one twice.

    Args:
        selector: its name.
        ids: chosen.
        candidates: how many there are.
        replacement: whether one may be chosen several times.

    Raises:
        InputError: names the first wrong id.
    """
    outside = ids[(ids < 0) | (ids >= candidates)]
    if len(outside):
        raise InputError(
            f"selector {selector!r}: choose returned the id {outside[0]}; ids from 0 to {candidates - 1} are expected"
        )
    counts = np.bincount(ids)
    if not replacement and counts.max(initial=0) > 1:
        raise InputError(
            f"selector {selector!r}: choose returned the id {counts.argmax()} {counts.max()} times; distinct ids are "
            "expected (or Selector(..., replacement=True))"
        )


def distribution_fault(weights: Float[np.ndarray, " K"]) -> str | None:
    """What keeps numbers from being a distribution, in words; None: they are one."""
    weights = np.asarray(weights, np.float64)
    if not np.isfinite(weights).all():
        return "not all finite"
    if (weights < 0).any():
        return f"{weights.min():.6g} is negative"
    total = weights.sum()
    return None if abs(total - 1) <= _TOLERANCE else f"the sum is {total:.6g}, not 1"


def _checked(
    who: str, name: str, function: Callable[..., Any] | None, expected: Callable[..., str | None]
) -> Callable[..., Any] | None:
    """`function`, its result refused where `expected` of it and of the arguments says what it should have been."""
    if function is None:
        return None

    @functools.wraps(function, updated=())
    def call(*arguments: Any) -> Any:
        with user_code(f"{who}: {name}"):
            result = function(*arguments)
        wanted = expected(result, *arguments)
        if wanted is not None:
            raise InputError(f"{who}: {name} returned {_described(result)}; expected {wanted}")
        return result

    return call


def _no_arrays(state: PyTree, *_: Any) -> str | None:
    others = [leaf for leaf in jax.tree.leaves(state) if not _is_array(leaf, jnp.generic)]
    return f"arrays and 32-bit numbers only, not a {type(others[0]).__name__}" if others else None


def _names(result: Any, state: PyTree) -> str | None:
    named = isinstance(result, Mapping) or hasattr(result, "_asdict")
    return None if named and _no_arrays(result) is None else "names to numbers"


def _proportions(result: Any) -> str | None:
    """What numbers that are known should be, where no later run can sample with them."""
    if isinstance(result, jax.core.Tracer):
        return None
    weights = np.asarray(result, np.float64)
    right = np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
    return None if right else "finite numbers >= 0, not all 0"


def _other_state(new: PyTree, old: PyTree, *_: Any) -> str | None:
    """What a new state must be like, where it is not like the old one."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return f"the structure of the state, {_described(old)}"
    pairs = zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True)
    for (path, leaf), before in pairs:
        if not _is_array(leaf, jnp.generic) or _type(leaf) != _type(before):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "the state"
            return f"a state like the one before, {name} being {_type(before)}, not {_described(leaf)}"
    return None


def _of_each(result: PyTree, number: int) -> bool:
    """Whether all leaves, and there are some, have an entry for each of a number of rows."""
    leaves = jax.tree.leaves(result)
    return bool(leaves) and all(_is_array(leaf, jnp.generic) and np.shape(leaf)[:1] == (number,) for leaf in leaves)


def _is_array(value: Any, kind: type, shape: tuple[int, ...] | None = None) -> bool:
    try:
        abstract = jax.typeof(value)
    except (TypeError, OverflowError):
        return False
    return jnp.issubdtype(abstract.dtype, kind) and shape in (None, abstract.shape)


def _is_real(value: Any, shape: tuple[int, ...] | None = None) -> bool:
    return any(_is_array(value, kind, shape) for kind in (jnp.floating, jnp.integer))


def _type(value: Any) -> str:
    """Such as "float32[3]"."""
    abstract = jax.typeof(value)
    return f"{abstract.dtype}[{','.join(map(str, abstract.shape))}]"


def _described(result: Any) -> str:
    """A result in short: types in place of arrays."""
    if _is_array(result, jnp.generic):
        return _type(result)
    if jax.tree_util.all_leaves([result]):
        return f"a {type(result).__name__}"
    types = jax.tree.map(lambda leaf: _Word(_described(leaf)), result)
    return one_line(repr(types), 200)


class _Word(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
