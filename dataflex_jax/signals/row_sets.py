"""Row sets: the rows of a run, each set with the sweeps that answer signals about it; see `policies.signals`."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from dataflex_jax.data.pool import Pool
from dataflex_jax.data.targets import TargetSet
from dataflex_jax.errors import InputError
from dataflex_jax.models.generation.generate import Codec
from dataflex_jax.policies import options
from dataflex_jax.policies.signals import (
    PARAMETERS,
    DomainGradients,
    Embeddings,
    Exchange,
    FixedEmbeddings,
    Generations,
    Gradients,
    Influences,
    Responses,
    Task,
)
from dataflex_jax.signals import (
    generation,
    model_signals,  # noqa: F401 - registers the signals
)
from dataflex_jax.signals.directions import add_gradient, direction_bytes, no_directions
from dataflex_jax.signals.judges import judged
from dataflex_jax.signals.moments import say_if_fresh
from dataflex_jax.signals.registry import Subject, row_function
from dataflex_jax.signals.rows import select_of, selected_paths
from dataflex_jax.signals.sweep import Source, Sweeper, source

# (where the rows are, which of them) -> their texts
ReadTexts = Callable[[Pool, Int[np.ndarray, " n"]], Iterator[str]]
Matrix = Float[np.ndarray, "n E"]
_SHARE_OF_DIRECTIONS = 0.25  # of a device's memory; the rest is the model's, its optimizer's and a batch's


class SweptRows:
    """A row set; see `policies.signals.RowSet`.

    Args:
        subject: what is asked; None: there is no model.
        sweeper: runs the sweeps.
        source: where the rows are.
        ids: which of them, in order.
        groups: group of each.
        group_names: of the groups.
        what: what these rows are, for the progress bar.
        fixed: what is there without asking the model, of each row.
        read: the texts of rows; None: nobody may ask.
    """

    def __init__(
        self,
        subject: Subject | None,
        sweeper: Sweeper,
        source: Source,
        ids: Int[np.ndarray, " n"],
        groups: Int[np.ndarray, " n"],
        group_names: Sequence[str],
        what: str,
        fixed: Mapping[FixedEmbeddings, Matrix] = MappingProxyType({}),
        read: ReadTexts | None = None,
    ):
        self._fixed, self._read = fixed, read
        self._subject, self._sweeper, self._source, self._ids, self._what = subject, sweeper, source, ids, what
        self.num_rows, self.groups, self.group_names = len(ids), groups, tuple(group_names)

    def sweep(self, signal: Hashable, ids: Int[np.ndarray, " m"] | None = None, operand: PyTree = None) -> PyTree:
        """See `policies.signals.RowSet`."""
        chosen = self._ids
        if ids is not None:
            if np.size(ids) and not 0 <= np.min(ids) <= np.max(ids) < self.num_rows:
                outside = next(i for i in np.ravel(ids).tolist() if not 0 <= i < self.num_rows)
                raise InputError(f"a sweep of row {outside} of {self._what}; there are rows 0 to {self.num_rows - 1}")
            chosen = self._ids[ids]
        if isinstance(signal, FixedEmbeddings):
            found = self._of_fixed(signal)
            return found if ids is None else found[ids]
        if isinstance(signal, Embeddings):
            self._refuse_packed("embeddings")
        subject = _asked(self._subject)
        if isinstance(signal, Gradients | Influences) and signal.adam is not None and subject.adam is not None:
            say_if_fresh(subject.adam)
        description = f"{type(signal).__name__.lower()} of {self._what}"
        return self._sweeper.run(row_function(signal), (subject, operand), self._source, chosen, description)

    def _of_fixed(self, signal: FixedEmbeddings) -> Matrix:
        if signal not in self._fixed:
            raise InputError(f"signal 'FixedEmbeddings' of {self._what}: not among the policy's `needs`; add it there")
        return self._fixed[signal]

    def texts(self) -> Iterator[str]:
        """See `policies.signals.RowSet`."""
        self._refuse_packed("texts")
        return self._read(self._source.pool, self._ids)

    def gradient_sums(self, weights: Float[np.ndarray, "n G"], parameters: str = "blocks") -> PyTree:
        """See `policies.signals.RowSet`."""
        options.one_of("parameters", parameters, PARAMETERS)
        model, mesh = _asked(self._subject).model, self._sweeper.mesh
        paths = selected_paths(model.params, select_of(parameters))
        total = no_directions(mesh, model.params, paths, weights.shape[1])
        for number, column in enumerate(weights.T):
            of_it = np.flatnonzero(column)
            description = f"gradient {number + 1} of {weights.shape[1]} of {self._what}"
            operands, ids = (model, np.int32(number)), self._ids[of_it]
            total = self._sweeper.fold(_add_gradient, total, operands, self._source, ids, column[of_it], description)
        return total

    def _refuse_packed(self, asked: str) -> None:
        if self._source.pool.packed:
            reason = f"{asked} of {self._what} are of single examples, and a row has several; set it to False"
            raise InputError(reason, option="data.packing", value=True)


def _asked(subject: Subject | None) -> Subject:
    if subject is None:
        raise InputError("there is no model to ask; --checkpoint gives one")
    return subject


def _add_gradient(operands, rows, total):
    model, number = operands
    return add_gradient(total, number, model, *rows)


class ModelSignals:
    """The signals of one model; see `policies.signals.Signals`.

    Attributes:
        compared: what `domain_gradients` gave last; None: nobody has asked.

    Args:
        subject: the model, and the optimizer's state where there is one; None: nothing but `fixed` may be asked for.
        sweeper: runs the sweeps.
        candidates: the training rows.
        targets: the target set, and its rows for sweeps; None: none.
        held_out: the same of the held-out rows, whose groups the domains are.
        domain_gradients: computes them; None: nobody may ask.
        fixed: embeddings that do not depend on the model: those of the candidates and of the targets.
        read: the texts of rows; None: nobody may ask.
        codec: text to tokens and back; None: nobody may ask for responses.
    """

    def __init__(
        self,
        subject: Subject | None,
        sweeper: Sweeper,
        candidates: Source,
        targets: tuple[TargetSet, Source] | None = None,
        domain_gradients: Callable[[], DomainGradients] | None = None,
        held_out: tuple[TargetSet, Source] | None = None,
        fixed: Mapping[FixedEmbeddings, tuple[Matrix, Matrix]] = MappingProxyType({}),
        read: ReadTexts | None = None,
        codec: Codec | None = None,
    ):
        self._fixed, self._read = fixed, read
        pool = candidates.pool
        self._asked = subject, sweeper, candidates
        self._target_rows, self._codec = targets, codec
        self._pool, self._domain_gradients = pool, domain_gradients
        self.compared: DomainGradients | None = None
        self.candidates = self._candidates(0, pool.num_rows, "candidates")
        of_targets = {signal: matrix for signal, (_, matrix) in fixed.items()}
        self.targets = self._others(targets, "targets", of_targets)
        self.held_out = self._others(held_out, "held-out rows", {})

    def room_for_directions(self, parameters: str = "blocks") -> int:
        """See `policies.signals.Signals`."""
        options.one_of("parameters", parameters, PARAMETERS)
        subject, sweeper, _ = self._asked
        params = _asked(subject).model.params
        one = direction_bytes(sweeper.mesh, params, selected_paths(params, select_of(parameters)))
        return int(_SHARE_OF_DIRECTIONS * sweeper.device_memory / one)

    def tasks(self) -> Sequence[Task]:
        """See `policies.signals.Signals`."""
        return [question.task for question in self._questions()]

    def _questions(self) -> list[generation.Question]:
        target_set, _ = self._target_rows
        return generation.questions(target_set.pool, target_set.ids, self._codec)

    def respond(self, generations: Generations, key: PRNGKeyArray) -> Responses:
        """See `policies.signals.Signals`."""
        (target_set, rows), (subject, sweeper, _) = self._target_rows, self._asked
        questions, samples = self._questions(), generations.samples
        each = np.repeat(np.arange(len(questions)), samples)
        asked = [questions[i] for i in each]
        prompt_lengths = np.array([len(question.prompt) for question in asked], np.uint32)
        tokens, lengths = sweeper.run(
            generation.sampler(generations),
            (_asked(subject).model, np.array(self._codec.stop_ids, np.int32)),
            rows,
            target_set.ids[each],
            "responses to targets",
            np.stack([prompt_lengths, generation.seeds(key, len(questions), samples).ravel()], axis=1),
        )
        exchanges, answers = generation.answered(asked, tokens, lengths, self._codec)
        swept = source(answers.pool("responses"), sweeper.mesh)
        # Sums over those of a target shall have few shapes.
        longest = np.repeat(swept.lengths.reshape(-1, samples).max(axis=1), samples)
        swept = swept._replace(lengths=longest, together=samples)
        groups = target_set.groups[each], target_set.names
        found = SweptRows(subject, sweeper, swept, np.arange(len(each)), *groups, "responses")
        return Responses(found, lengths.reshape(-1, samples), exchanges)

    def judge(self, judge: str, exchanges: Sequence[Exchange]) -> Float[np.ndarray, " n"]:
        """See `policies.signals.Signals`."""
        (target_set, _), (subject, sweeper, _) = self._target_rows, self._asked
        ids = target_set.ids[[exchange.task.place for exchange in exchanges]]
        read = target_set.pool.conversations(ids)
        conversations = None if read is None else [read[i] for i in ids.tolist()]
        return judged(judge, exchanges, conversations, _asked(subject).model.config, sweeper)

    def domain_gradients(self) -> DomainGradients:
        """See `policies.signals.Signals`."""
        self.compared = self._domain_gradients()
        return self.compared

    @property
    def checkpoints(self) -> Sequence[tuple[float, "ModelSignals"]]:
        """This model alone, with weight 1."""
        return ((1.0, self),)

    @property
    def domains(self) -> tuple[SweptRows, ...]:
        """The training rows domain by domain."""
        bounds = itertools.pairwise(self._pool.offsets.tolist())
        names = (domain.name for domain in self._pool.domains)
        return tuple(self._candidates(*bound, name) for bound, name in zip(bounds, names, strict=True))

    def _others(
        self, rows: tuple[TargetSet, Source] | None, what: str, fixed: Mapping[FixedEmbeddings, Matrix]
    ) -> SweptRows | None:
        if rows is None:
            return None
        (subject, sweeper, _), (chosen, source) = self._asked, rows
        groups = (chosen.groups, chosen.names)
        return SweptRows(subject, sweeper, source, chosen.ids, *groups, what, fixed, self._read)

    def _candidates(self, start: int, stop: int, what: str) -> SweptRows:
        ids, names = np.arange(start, stop), [domain.name for domain in self._pool.domains]
        fixed = {signal: matrix[start:stop] for signal, (matrix, _) in self._fixed.items()}
        return SweptRows(*self._asked, ids, self._pool.domain_of(ids), names, what, fixed, self._read)
