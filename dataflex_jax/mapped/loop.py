"""The loop over the steps of S models at once; as in `training.loop`, the host is at most one step behind."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dataflex_jax import preemption
from dataflex_jax.data.batch import Batch
from dataflex_jax.data.sampler import Plan
from dataflex_jax.errors import TrainingError
from dataflex_jax.mapped import states as mapped_states
from dataflex_jax.mapped.draws import Draws
from dataflex_jax.mapped.members import Member
from dataflex_jax.mapped.programs import MappedStep
from dataflex_jax.mapped.refreshing import Refreshes
from dataflex_jax.training import ledger
from dataflex_jax.training.assembly import Experiment
from dataflex_jax.training.ledger import Done, Position, Publishing
from dataflex_jax.training.state import TrainState


class Standing(NamedTuple):
    """Where S models stand.

    Attributes:
        step: the last one done.
        states: after it.
        positions: of each, after it.
    """

    step: int
    states: TrainState
    positions: list[Position]


class Together(NamedTuple):
    """S models to be trained as one program.

    Attributes:
        experiment: what they share.
        members: who they are.
        draws: which rows they see.
        step: the mapped train step.
        refreshes: what is asked between two steps.
        last_good: what is safe where they cannot go on, in words.
    """

    experiment: Experiment
    members: Sequence[Member]
    draws: Draws
    step: MappedStep
    refreshes: Refreshes
    last_good: Callable[[], str]


class _Dispatched(NamedTuple):
    plans: Sequence[Plan]
    rows: np.ndarray
    metrics: dict[str, Any]


class Training:
    """S models in training: the states that the devices work on, and the books that follow them.

    Attributes:
        step: the last one dispatched.

    Args:
        together: the models.
        standing: where they begin.
        stepped: (step, mean loss, tokens of all models) is called when a step is read.
    """

    def __init__(self, together: Together, standing: Standing, stepped: Callable[[int, float, int], None]):
        self._together, self._stepped = together, stepped
        self.step, self._states, self._positions = standing.step, standing.states, list(standing.positions)
        config, policies = together.experiment.config, together.experiment.policies
        self._publishing = Publishing(policies.mixer.schedule, config.data.lag)
        self._in_flight: list[_Dispatched] = []
        self._upcoming: tuple[Sequence[Plan], np.ndarray, Future[Batch]] | None = None

    def prepare(self, pool: ThreadPoolExecutor) -> None:
        """Plans the next step and has its rows gathered."""
        draws = self._together.draws
        samplers = [position.sampler for position in self._positions]
        self._states = self._together.refreshes.between(self.step, self._states, samplers)
        plans, after = zip(*draws.plans(samplers), strict=True)
        rows = draws.rows(plans)
        self._upcoming = plans, rows, pool.submit(draws.load, rows, plans)
        self._positions = [p._replace(sampler=s) for p, s in zip(self._positions, after, strict=True)]

    def dispatch(self) -> None:
        """Starts the step that was prepared."""
        plans, rows, batch = self._upcoming
        self.step += 1
        self._states, metrics = self._together.step(self._states, batch.result())
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self._in_flight.append(_Dispatched(plans, rows, metrics))

    def settle(self, behind: int) -> None:
        """Waits for all steps but the last `behind` and enters them in the books.

        Raises:
            TrainingError: something in them is not finite.
        """
        while len(self._in_flight) > behind:
            plans, rows, metrics = self._in_flight.pop(0)
            values = jax.device_get(metrics)
            counts = self._together.draws.domain_rows(rows)
            for number, (plan, of_domain) in enumerate(zip(plans, counts, strict=True)):
                done = Done(plan.step, of_domain, jax.tree.map(lambda leaf, n=number: leaf[n], values))
                self._enter(number, done)
            self._stepped(plans[0].step, float(np.mean(values["loss"])), int(np.sum(values["tokens"])))

    def standing(self) -> Standing:
        """Where the models stand, every step being read.

        Raises:
            TrainingError: a parameter or a moment of one of them is not finite.
        """
        self.settle(0)
        for member, fine in zip(self._together.members, np.asarray(mapped_states.finite(self._states)), strict=True):
            if not fine:
                raise self._failed(member, f"a parameter or optimizer moment is not finite at step {self.step}")
        return Standing(self.step, self._states, self._positions)

    def _enter(self, number: int, done: Done) -> None:
        together, policies = self._together, self._together.experiment.policies
        names = [domain.name for domain in together.experiment.inputs.domains]
        if fault := ledger.fault(done, names, policies.mixer.name, policies.weighing()):
            raise self._failed(together.members[number], fault)
        self._positions[number] = ledger.advanced(self._positions[number], done, self._publishing)

    def _failed(self, member: Member, fault: str) -> TrainingError:
        return TrainingError(f"{member.name}: {fault}; {self._together.last_good()}")


def train(
    together: Together,
    standing: Standing,
    save: Callable[[Standing], None],
    stop_requested: Callable[[int], bool],
    stepped: Callable[[int, float, int], None],
) -> Standing:
    """Trains to the end, or, saved, to the next step boundary after a request to stop.

    Args:
        together: the models.
        standing: where they begin.
        save: is called every `config.checkpoint_every` steps, and at a request to stop.
        stop_requested: whether to stop after a step.
        stepped: as for `Training`.

    Raises:
        TrainingError: a model that cannot go on, named.
    """
    config = together.experiment.config
    training = Training(together, standing, stepped)
    with ThreadPoolExecutor(1) as pool:
        while training.step < config.train_step:
            try:
                training.prepare(pool)
            except preemption.StopRequested:
                # In the middle of a refresh, which a later run makes again.
                save(training.standing())
                break
            training.dispatch()
            stopping = stop_requested(training.step) and training.step < config.train_step
            training.settle(min(config.data.lag, 1))
            if stopping or training.step % config.checkpoint_every == 0:
                save(training.standing())
            if stopping:
                break
    return training.standing()
