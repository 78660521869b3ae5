"""Which tokens are read, and in which order, to answer many requests that share much of what they read.

A request asks for the likelihood of a continuation after a context. Requests that read the same tokens, such as the
choices A, B, C and D of one question, are one text with several questions; texts that begin with the same tokens, such
as the questions after the same examples, are a group whose beginning is read once.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Tokens = Sequence[int]
# What a group must save, in tokens, to be worth a forward pass of its own.
_WORTH = 64


class Question(NamedTuple):
    """A continuation whose likelihood after a text is asked for.

    Attributes:
        request: its number.
        first: which token of the text, from 0, the first of the continuation comes after.
        labels: the continuation.
    """

    request: int
    first: int
    labels: Tokens


class Text(NamedTuple):
    """Tokens that are read, and what is asked about them."""

    tokens: tuple[int, ...]
    questions: list[Question]

    @property
    def free(self) -> int:
        """Tokens before the first that something is asked after."""
        return min(question.first for question in self.questions)

    @property
    def num_labels(self) -> int:
        """Of all its questions."""
        return sum(len(question.labels) for question in self.questions)


@dataclasses.dataclass(frozen=True)
class Group:
    """Texts whose first `shared` tokens are the same and are read once; 0: they are read by themselves."""

    texts: Sequence[Text]
    shared: int = 0


def texts_of(requests: Sequence[tuple[Tokens, Tokens]], max_length: int) -> list[Text]:
    """What is read for the requests, sorted by its tokens.

    Args:
        requests: (context, continuation), both with a token or more.
        max_length: tokens that the model reads; of more, the last ones, as the harness does it.
    """
    asked: dict[tuple[int, ...], list[Question]] = {}
    for number, (context, continuation) in enumerate(requests):
        read = (*context, *continuation)[-(max_length + 1) : -1]
        labels = continuation[-len(read) :]
        asked.setdefault(read, []).append(Question(number, len(read) - len(labels), labels))
    texts: list[Text] = []
    for tokens in sorted(asked, reverse=True):
        if texts and texts[-1].tokens[: len(tokens)] == tokens:
            texts[-1].questions.extend(asked[tokens])  # causal: what comes later changes nothing
        else:
            texts.append(Text(tokens, asked[tokens]))
    return texts[::-1]


def groups_of(texts: Sequence[Text]) -> list[Group]:
    """The texts in groups, of each of which what all its texts begin with is read once.

    Of the tree that what the sorted texts share makes, a branch is one group where that saves more tokens than the
    groups that its own branches are.
    """
    shared = [0, *itertools.starmap(_shared, itertools.pairwise(texts)), -1]
    open_branches: list[_Branch] = []
    for stop in range(1, len(texts) + 1):
        depth, branch = shared[stop], _Branch(0, stop - 1, [Group(texts[stop - 1 : stop])])
        while open_branches and open_branches[-1].depth > depth:
            branch = open_branches.pop().joined(branch).closed(texts, stop)
        if open_branches and open_branches[-1].depth == depth:
            open_branches.append(open_branches.pop().joined(branch))
        else:
            open_branches.append(dataclasses.replace(branch, depth=depth))
    return open_branches[0].groups if open_branches else []


@dataclasses.dataclass(frozen=True)
class _Branch:
    """Texts from number `start` on that share their first `depth` tokens, and the groups that they are so far."""

    depth: int
    start: int
    groups: list[Group]
    saved: int = 0

    def joined(self, last: "_Branch") -> "_Branch":
        self.groups.extend(last.groups)
        return dataclasses.replace(self, saved=self.saved + last.saved)

    def closed(self, texts: Sequence[Text], stop: int) -> "_Branch":
        """The branch with all its texts, as one group where that saves more than its branches do."""
        saved = (stop - self.start - 1) * self.depth - _WORTH
        if saved <= self.saved:
            return self
        return dataclasses.replace(self, groups=[Group(texts[self.start : stop], self.depth)], saved=saved)


def _shared(a: Text, b: Text) -> int:
    """How many first tokens two texts may share so that each keeps those that something is asked after."""
    most = min(len(a.tokens), len(b.tokens), a.free, b.free)
    first, second = (np.array(text.tokens[:most]) for text in (a, b))
    differ: Int[np.ndarray, " n"] = np.flatnonzero(first != second)
    return int(differ[0]) if len(differ) else most


def bucket(length: int, least: int = 16) -> int:
    """The least of 16, 24, 32, 48, 64 and so on that holds `length`: few shapes, a sixth of padding."""
    power = 1 << max(length - 1, 0).bit_length()
    return max(least, power * 3 // 4 if power * 3 // 4 >= length else power)
