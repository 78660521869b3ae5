"""The likelihood of continuations, many at a time: in length buckets, with what texts share read once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dataflex_jax.harness.plan import Group, Text, Tokens, bucket, groups_of, texts_of
from dataflex_jax.models import scoring
from dataflex_jax.models.model import Model
from dataflex_jax.models.scoring import Prefixes, Scores, Texts
from dataflex_jax.sharding import batch_sharding, replicated, row_shards

# Tokens that a device reads at a time; more do not make it faster.
_CPU_TOKENS = 2**12
_ACCELERATOR_TOKENS = 2**14
# Prefixes may have this many times as many, as their keys and values are all that is there of them.
_PREFIX_TOKENS = 4


class Answer(NamedTuple):
    """What is said of a continuation: its log-probability in nats, and whether greedy decoding would give it."""

    log_prob: float
    greedy: bool


class _Rest(NamedTuple):
    """A text from its token `start` on; prefix number `prefix` has what is before."""

    text: Text
    start: int = 0
    prefix: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return len(self.text.tokens) - self.start, self.text.num_labels


class Likelihoods:
    """Answers requests; compiles once for each kind of model and each shape.

    Several hosts must ask the same requests in the same order.

    Args:
        mesh: the devices.
        tokens: that a device reads at a time; None: as suits the devices.
    """

    def __init__(self, mesh: Mesh, *, tokens: int | None = None):
        self._mesh = mesh
        self._tokens = tokens or (_CPU_TOKENS if jax.default_backend() == "cpu" else _ACCELERATOR_TOKENS)
        self._shards = row_shards(mesh)
        whole = replicated(mesh)
        self._scored = jax.jit(scoring.scored, out_shardings=Scores(whole, whole))
        self._read = jax.jit(scoring.read)

    def of(self, model: Model, requests: Sequence[tuple[Tokens, Tokens]], max_length: int) -> list[Answer]:
        """The answer to each (context, continuation), both of one token or more.

        Args:
            model: on the mesh.
            requests: token ids.
            max_length: tokens that the model reads; of more, the last ones.
        """
        answers: dict[int, Answer] = {}
        groups = groups_of(texts_of(requests, max_length))
        bar = tqdm(total=len(requests), desc="likelihoods", disable=jax.process_index() > 0, leave=False)
        with bar, jax.set_mesh(self._mesh):
            pending: list[tuple[Sequence[_Rest], Scores]] = []
            for part in self._parts(model, groups):
                pending.append(part)
                if len(pending) > 1:  # the devices compute the one while the host makes the next
                    bar.update(_enter(*pending.pop(0), answers))
            for part in pending:
                bar.update(_enter(*part, answers))
        return [answers[number] for number in range(len(requests))]

    def _parts(self, model: Model, groups: Sequence[Group]) -> Iterator[tuple[Sequence[_Rest], Scores]]:
        for prefixes, rests in self._with_prefixes(model, groups):
            before = 0 if prefixes is None else prefixes.keys.shape[2]
            rests.sort(key=lambda rest: rest.size, reverse=True)
            while rests:
                part = rests[: self._rows(rests[0].size[0], before)]
                rests = rests[len(part) :]
                yield part, self._scored(model, self._texts(part), prefixes)

    def _with_prefixes(self, model: Model, groups: Sequence[Group]) -> Iterator[tuple[Prefixes | None, list[_Rest]]]:
        yield None, [_Rest(group.texts[0]) for group in groups if not group.shared]
        groups = sorted((group for group in groups if group.shared), key=lambda group: -group.shared)
        while groups:
            some = groups[: self._rows(groups[0].shared)]
            groups = groups[len(some) :]
            tokens, lengths = _padded([group.texts[0].tokens[: group.shared] for group in some], self._shards)
            yield (
                self._read(model, self._placed(tokens), self._placed(lengths)),
                [_Rest(text, group.shared, i) for i, group in enumerate(some) for text in group.texts],
            )

    def _rows(self, length: int, before: int = 0) -> int:
        """How many rows of a length are read at a time, after prefixes of the length `before`."""
        fitting = self._tokens // bucket(length)
        if before:
            fitting = min(fitting, _PREFIX_TOKENS * self._tokens // before)
        return self._shards * max(1, fitting)

    def _texts(self, rests: Sequence[_Rest]) -> Texts:
        tokens, _ = _padded([rest.text.tokens[rest.start :] for rest in rests], self._shards)
        questions = bucket(max(rest.text.num_labels for rest in rests), 1)
        prefix = np.zeros(len(tokens), np.int32)
        prefix[: len(rests)] = [rest.prefix for rest in rests]
        places, labels = np.zeros((2, len(tokens), questions), np.int32)
        for row, rest in enumerate(rests):
            asked = [
                (each.first - rest.start + i, label)
                for each in rest.text.questions
                for i, label in enumerate(each.labels)
            ]
            places[row, : len(asked)], labels[row, : len(asked)] = np.array(asked).reshape(-1, 2).T
        return Texts(*map(self._placed, (tokens, prefix, places, labels)))

    def _placed(self, rows: np.ndarray) -> Any:
        return jax.make_array_from_callback(rows.shape, batch_sharding(self._mesh), rows.__getitem__)


def _padded(rows: Sequence[Tokens], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as an array of few shapes, its number of rows a multiple of `multiple`, and their lengths, at least 1."""
    number = multiple * (1 << (-(-len(rows) // multiple) - 1).bit_length())
    tokens = np.zeros((number, bucket(max(map(len, rows)))), np.int32)
    lengths = np.ones(number, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def _enter(rests: Sequence[_Rest], scores: Scores, answers: dict[int, Answer]) -> int:
    """Enters the answers to what is asked about some texts; returns how many they are."""
    log_probs, greedy = jax.device_get(scores)
    before = len(answers)
    for row, rest in enumerate(rests):
        start = 0
        for question in rest.text.questions:
            asked = slice(start, start + len(question.labels))
            start = asked.stop
            total = float(log_probs[row, asked].sum(dtype=np.float64))
            answers[question.request] = Answer(total, bool(greedy[row, asked].all()))
    return len(answers) - before
