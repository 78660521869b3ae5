"""Rewards by name: how good a response is, as a number, the higher the better.

A reward is a function of (prompt, response, reference), texts all three:

    def short(prompt: str, response: str, reference: str) -> float:
        return 1 / (1 + len(response.split()))

`reward="my_package.my_rewards:short"` names one of your own, `reward="hf:FOLDER_OR_ID"` a sequence-classification
checkpoint, which reads the target's conversation with the response in it.
"""

import collections
import importlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from dataflex_jax.errors import InputError, one_line, shown
from dataflex_jax.policies import options
from dataflex_jax.policies.contract import takes
from dataflex_jax.policies.signals import Exchange, Signals, Task
from dataflex_jax.policies.user_code import user_code

RewardFunction = Callable[[str, str, str], float]

_JUDGE = "hf:"
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")  # of Chinese and Japanese each character
_LEADING_LETTER = re.compile(r"\W*([A-Z])\s*(?:$|[\n.,:;)\]}])")
_NAMED_LETTER = re.compile(r"(?i:answer|option|choice)\W*(?:(?i:is|be)\W*)?([A-Z])\b")
_BRACKETED_LETTER = re.compile(r"[(\[]([A-Z])[)\]]")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def exact_match(prompt: str, response: str, reference: str) -> float:
    """1 where the response is the reference, whatever the spaces between words."""
    del prompt
    return float(response.split() == reference.split())


def contains(prompt: str, response: str, reference: str) -> float:
    """1 where the reference's words stand in the response, side by side and in any capitals."""
    del prompt
    said, wanted = _words(response), _words(reference)
    return float(any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)))


def token_f1(prompt: str, response: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the response's words, in any capitals, among the reference's."""
    del prompt
    said, wanted = _words(response), _words(reference)
    common = sum((collections.Counter(said) & collections.Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def multiple_choice(prompt: str, response: str, reference: str) -> float:
    """1 where the response chooses the reference's letter.

    The letter is the one that a text begins with ("B", "(B) ...", "B. ..."), or else the last that is called the
    answer ("the answer is B"), or else the last in brackets.
    """
    del prompt
    chosen = _letter(response)
    return float(chosen is not None and chosen == _letter(reference))


def _letter(text: str) -> str | None:
    if match := _LEADING_LETTER.match(text):
        return match[1]
    found = _NAMED_LETTER.findall(text) or _BRACKETED_LETTER.findall(text)
    return found[-1] if found else None


def matching(pattern: re.Pattern) -> RewardFunction:
    """The reward by a pattern: 1 where it is found in the response.

    With a group, as in `r"#### (-?[0-9]+)"`, what its last match in the response has there must be what it has in the
    reference, or the whole reference where the pattern is not found in it.
    """

    def last(text: str) -> str | None:
        matches = [match[1] for match in pattern.finditer(text)]
        return matches[-1] if matches else None

    def regex(prompt: str, response: str, reference: str) -> float:
        del prompt
        if not pattern.groups:
            return float(pattern.search(response) is not None)
        said, wanted = last(response), last(reference)
        return float(said is not None and said.strip() == (reference if wanted is None else wanted).strip())

    return regex


COMPARING: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "contains": contains,
    "token_f1": token_f1,
    "multiple_choice": multiple_choice,
}
NAMES = (*COMPARING, "regex")


class Reward(NamedTuple):
    """How responses are rewarded.

    Attributes:
        name: as it was given.
        of: the function; None: a model judges.
        compares: whether it needs a reference.
    """

    name: str
    of: RewardFunction | None
    compares: bool

    @property
    def judge(self) -> str:
        """The checkpoint that judges, where there is no function."""
        return self.name.removeprefix(_JUDGE)

    def check(self, tasks: Sequence[Task], signals: Signals) -> None:
        """Refuses what would only be seen once responses are there.

        Raises:
            InputError: an empty reference that it compares with, by name; a judge that cannot be read.
        """
        for task in tasks if self.compares else ():
            if not task.reference.strip():
                raise InputError(
                    f"reward {self.name!r}: the reference of {task.where} is empty; it compares responses with it"
                )
        if self.of is None:
            self.rewards([Exchange(tasks[0], tasks[0].reference, tasks[0].prompt + tasks[0].reference)], signals)

    def rewards(self, exchanges: Sequence[Exchange], signals: Signals) -> Float[np.ndarray, " n"]:
        """The reward of each response.

        Raises:
            InputError: the function raises something, or a reward is no finite number; names the example.
        """
        if self.of is None:
            found = signals.judge(self.judge, exchanges).tolist()
        else:
            found = [self._reward(exchange) for exchange in exchanges]
        values = [_finite(self.name, each.task.where, value) for each, value in zip(exchanges, found, strict=True)]
        made = np.array(values, np.float32)
        # A user's function need not return the same on every host, but all must go on with the same.
        return multihost_utils.broadcast_one_to_all(made) if jax.process_count() > 1 else made

    def _reward(self, exchange: Exchange) -> float:
        task = exchange.task
        with user_code(f"reward {self.name!r} of a response to {task.where}"):
            return self.of(task.prompt, exchange.response, task.reference)


def reward(name: str, pattern: str | None) -> Reward:
    """The reward of a name.

    Args:
        name: one of `NAMES`, "module:function", or "hf:" and a checkpoint.
        pattern: of "regex"; None with others.

    Raises:
        ValueError: no such reward, or a pattern that cannot be.
    """
    compiled = _pattern(name, pattern)
    if compiled is not None:
        return Reward(name, matching(compiled), compares=compiled.groups > 0)
    if name in COMPARING:
        return Reward(name, COMPARING[name], compares=True)
    if name.startswith(_JUDGE) and name != _JUDGE:
        return Reward(name, None, compares=False)
    return Reward(name, _loaded(name), compares=False)


def _pattern(name: str, pattern: str | None) -> re.Pattern | None:
    if name != "regex":
        options.require("pattern", pattern, pattern is None, "None: only the reward 'regex' has one")
        return None
    options.require("pattern", pattern, bool(pattern), "a regular expression, for the reward 'regex'")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        options.refuse("pattern", pattern, f"is no regular expression ({one_line(error)})")


def _loaded(name: str) -> RewardFunction:
    accepted = f"one of {', '.join(NAMES)}, or module:function, or hf:CHECKPOINT"
    module, _, function = name.partition(":")
    named = re.fullmatch(r"[\w-]+(\.[\w-]+)*", module) is not None and function.isidentifier()
    options.require("reward", name, named, accepted)
    with user_code(f"reward {name!r}: importing {module!r}"):
        try:
            loaded = getattr(importlib.import_module(module), function, None)
        except ModuleNotFoundError as error:
            options.refuse("reward", name, f"cannot import {module!r} ({one_line(error)}); must be {accepted}")
    wanted = "a function of (prompt, response, reference) in that module"
    options.require("reward", name, takes(loaded, 3), wanted)
    return loaded


def _finite(name: str, where: str, value: object) -> float:
    found = np.asarray(value)
    # Whatever is a number of anybody's, as float32 holds it.
    if found.dtype.kind not in "fiub" or found.size != 1 or not abs(found.item()) <= options.LARGEST_NUMBER:
        raise InputError(
            f"reward {name!r} of a response to {where} returned {shown(value)}; a finite number is expected"
        )
    return float(found.item())
