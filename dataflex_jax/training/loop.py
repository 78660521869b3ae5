"""The loop: dispatch a step, read the one before, publish what the mixer decided, save, evaluate, stop on request.

The host is never more than one step behind the device and never makes it wait: while step n runs, the metrics of step
n - 1 are read, weights that the schedule publishes are handed to the sampler, and the rows of step n + 1 are gathered.
Selections come between two steps, after the checkpoint of the first; whatever interrupts one, it is made again.
"""

import collections
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dataflex_jax import preemption
from dataflex_jax.data.batch import Batch
from dataflex_jax.data.sampler import Plan
from dataflex_jax.errors import TrainingError, is_disk_full
from dataflex_jax.reporting.run_log import RunLog, Standing, go_back
from dataflex_jax.training import ledger, resume
from dataflex_jax.training.checkpoint import Contents
from dataflex_jax.training.domain_weights import WEIGHTS_FILE, write_weights
from dataflex_jax.training.job import Job, Outcome
from dataflex_jax.training.ledger import Done, Position
from dataflex_jax.training.state import TrainState, all_finite

logger = logging.getLogger(__name__)


def run(job: Job, state: TrainState, position: Position, run_folder: Path) -> Outcome:
    """Trains from `state` and `position` to the end, or to the next step boundary after a request to stop.

    Raises:
        TrainingError: a non-finite loss or gradient, a full disk, or a checkpoint that could not be written.
    """
    done, train_step = position.sampler.step, job.cadence.train_step
    lines = job.checkpoints.lines(done) if done > 0 else {}
    if done >= train_step:
        if jax.process_index() == 0:
            go_back(run_folder, done, lines)
        logger.info("Nothing to do: the checkpoint is at step %d of config.train_step = %d.", done, train_step)
        return Outcome(done, False, position.tokens_seen)
    if job.selection is not None and jax.process_index() == 0:
        job.selection.forget_after(done)
    try:
        with ThreadPoolExecutor(1) as pool, RunLog(job.log, run_folder, done, lines) as log:
            return _to_the_end(Running(job, log, pool, run_folder, state, position))
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise TrainingError(f"{run_folder}: {error.strerror}; {job.checkpoints.last_good()}") from error


def _to_the_end(running: "Running") -> Outcome:
    job, train_step, preempted = running.job, running.job.cadence.train_step, False
    try:
        running.prepare()
        while running.step < train_step:
            running.dispatch()
            step = running.step
            preempted = job.stop_requested(step)
            last = preempted or step == train_step
            due = [each for each in job.evaluators if step == train_step or (each.every and step % each.every == 0)]
            to_save = last or step % job.cadence.checkpoint == 0
            selects = job.selection is not None and job.selection.due(step)
            running.settle(0 if due or to_save or selects else min(job.publishing.lag, 1))
            with running.log.paused():
                if due or to_save:
                    running.check_state()
                for evaluator in due:
                    running.log.evaluated(step, evaluator.run(job.model(running.state.params)))
                if to_save:
                    running.save()
            if last:
                break
            running.prepare()
    except preemption.StopRequested:
        # A later run decides again what was being decided.
        preempted = True
        running.settle(0)
        if running.step > running.saved:
            running.check_state()
            running.save()
    job.checkpoints.wait()
    outcome = Outcome(running.step, preempted and running.step < train_step, running.position.tokens_seen)
    tokens_per_second, mfu = running.log.rates()
    return outcome._replace(tokens_per_second=tokens_per_second, mfu=mfu)


class _Dispatched(NamedTuple):
    """A step that the device may still be running."""

    plan: Plan
    rows: np.ndarray
    metrics: dict[str, Any]


class Running:
    """A run under way: the state that the device works on, and the books that follow it.

    Attributes:
        job: what the run consists of.
        log: what it writes.
        state: after the last step that was dispatched.
        position: after the last step that was read; its sampler is ahead by the steps that were planned.
        step: the last one dispatched.
        saved: the last one saved.
    """

    def __init__(
        self,
        job: Job,
        log: RunLog,
        pool: ThreadPoolExecutor,
        run_folder: Path,
        state: TrainState,
        position: Position,
    ):
        self.job, self.log, self.state, self.position = job, log, state, position
        self.step = self.saved = position.sampler.step
        self._pool, self._folder = pool, run_folder
        self._in_flight: collections.deque[_Dispatched] = collections.deque()
        self._upcoming: tuple[Plan, np.ndarray, Future[Batch]] | None = None
        self._last: Done | None = None
        self._said_nothing_counts = False

    def prepare(self) -> None:
        """Has the policies decide what is due, plans the next step and has its rows gathered."""
        job, planned = self.job, self.position.sampler
        with self.log.paused():
            self.state, records = job.updates.between(self.step, self.state, planned)
        for record in records:
            self.log.decided(record)
        plan, after = job.draws.sampler.plan(planned)
        if exhausted := job.draws.sampler.exhausted(planned, after):
            self._say_exhausted([job.draws.groups[number].name for number in exhausted])
        rows = job.draws.sequences.ids(plan)
        drawn_with = plan.drawn_with if job.policies.by_domain else job.draws.pool.natural
        self._upcoming = plan, rows, self._pool.submit(job.load, plan, rows, drawn_with)
        self.position = self.position._replace(sampler=after)

    def _say_exhausted(self, names: list[str]) -> None:
        with self.log.paused():
            gave, those = "the last rows that config.data.max_epochs leaves", ", ".join(names)
            logger.info("step %d has %s of %s; the other domains take their part.", self.step + 1, gave, those)
        self.log.decided({"step": self.step, "policy": "max_epochs", "exhausted": names})

    def dispatch(self) -> None:
        """Starts the step that was prepared."""
        plan, rows, batch = self._upcoming
        self.step += 1
        self.state, metrics = self.job.step(self.state, batch.result())
        self._in_flight.append(_Dispatched(plan, rows, _start_fetch(metrics)))

    def settle(self, behind: int) -> None:
        """Waits for all steps but the last `behind`, enters them in the books and writes their lines.

        Raises:
            TrainingError: something in them is not finite.
        """
        job, names = self.job, list(self.job.log.domains)
        while len(self._in_flight) > behind:
            dispatched = self._in_flight.popleft()
            domains = job.draws.pool.domain_of(dispatched.rows)
            values = jax.device_get(dispatched.metrics)
            done = Done(dispatched.plan.step, np.bincount(domains, minlength=len(names)), values)
            if fault := ledger.fault(done, names, job.policies.mixer.name, job.policies.weighing()):
                raise self._failed(fault)
            if ledger.counts_nothing(done) and not self._said_nothing_counts:
                logger.warning("%s.", ledger.at(f"{job.policies.weighing()}: all weights are 0", done, names))
                self._said_nothing_counts = True
            self.position = ledger.advanced(self.position, done, job.publishing)
            _, tokens_seen, rows_seen = self.position
            standing = Standing(tokens_seen, rows_seen, job.publishing.effective_step(done.step))
            self.log.stepped(done.step, values, standing)
            self._last = done

    def check_state(self) -> None:
        """Refuses to evaluate or save what the last step made of the parameters, the optimizer and the mixer.

        Raises:
            TrainingError: they are not all finite.
        """
        if not bool(all_finite(self.state)):
            what = "a parameter or optimizer moment is not finite"
            raise self._failed(ledger.at(what, self._last, list(self.job.log.domains)))

    def save(self) -> None:
        """Starts writing a checkpoint, and what later runs may sample with, where the mixer has such a thing."""
        job = self.job
        arrays = job.selection.arrays() if job.selection else {}
        run = resume.to_json(job.identity, self.position)
        job.checkpoints.save(self.step, Contents(self.state, run, arrays, self.log.synced()))
        self.saved = self.step
        if job.average is not None and jax.process_index() == 0:
            weights = np.asarray(job.average(jax.device_get(self.state.mixer)), np.float64)
            names = list(job.log.domains)
            write_weights(self._folder / WEIGHTS_FILE, names, weights, mixer=job.policies.mixer.name, step=self.step)

    def _failed(self, fault: str) -> TrainingError:
        return TrainingError(f"{fault}; {self.job.checkpoints.last_good()}")


def _start_fetch(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, on their way to the host."""
    for leaf in jax.tree.leaves(metrics):
        leaf.copy_to_host_async()
    return metrics
