"""The loop: dispatch a step, read the one before, publish what the mixer decided, save, evaluate, stop on request.

The host is never more than one step behind the device and never makes it wait: while step n runs, the metrics of step
n - 1 are read, weights that the schedule publishes are handed to the sampler, and the rows of step n + 1 are gathered.
Selections come between two steps, after the checkpoint of the first; whatever interrupts one, it is made again.
"""

import collections
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from dataflex_jax import preemption
from dataflex_jax.data.loader import Batch
from dataflex_jax.data.sampler import Plan, SamplerState
from dataflex_jax.errors import TrainingError, is_disk_full
from dataflex_jax.reporting.run_log import Dispatched, RunLog
from dataflex_jax.training import resume
from dataflex_jax.training.job import Job, Outcome
from dataflex_jax.training.resume import Position
from dataflex_jax.training.step import PyTree, TrainState, all_finite

logger = logging.getLogger(__name__)


def run(job: Job, state: TrainState, position: Position, run_folder: Path) -> Outcome:
    """Trains from `state` and `position` to the end, or to the next step boundary after a request to stop.

    Raises:
        TrainingError: a non-finite loss or gradient, a full disk, or a checkpoint that could not be written.
    """
    try:
        return _run(job, state, position, run_folder)
    except OSError as e:
        if not is_disk_full(e):
            raise
        raise TrainingError(f"{run_folder}: {e.strerror}; {job.checkpoints.last_good()}") from e


def _run(job: Job, state: TrainState, position: Position, run_folder: Path) -> Outcome:
    done = position.sampler.step
    if done >= job.cadence.train_step:
        logger.info(
            "Nothing to do: the checkpoint is at step %d of config.train_step = %d.", done, job.cadence.train_step
        )
        return Outcome(done, False, position.tokens_seen, None, None)
    log = RunLog(job, run_folder, position)
    in_flight: collections.deque[Dispatched] = collections.deque()
    planned, step, saved = position.sampler, done, done
    with ThreadPoolExecutor(1) as pool, log:

        def save() -> None:
            at = Position(planned, log.tokens_seen, log.rows_seen)
            arrays = job.selection.arrays() if job.selection else {}
            job.checkpoints.save(step, state, resume.to_json(job.identity, at), arrays)
            log.saved(step, state.mixer)

        def upcoming() -> tuple[TrainState, Plan, np.ndarray, SamplerState, Future[Batch]]:
            with log.paused():
                updated, records = job.between(step, state, planned)
            for record in records:
                log.decided(record)
            plan, after = job.sampler.plan(planned)
            rows = job.sequences.ids(plan)
            drawn_with = plan.drawn_with if len(plan.drawn_with) == len(job.domains) else log.natural
            return updated, plan, rows, after, pool.submit(job.loader.load, rows, drawn_with)

        preempted = False
        try:
            state, plan, rows, planned, batch = upcoming()
            while step < job.cadence.train_step:
                step += 1
                state, metrics = job.step(state, batch.result())
                in_flight.append(Dispatched(plan, rows, _start_fetch(metrics)))
                preempted = job.stop_requested(step)
                last = preempted or step == job.cadence.train_step
                evaluate = step == job.cadence.train_step or (job.cadence.evaluate and step % job.cadence.evaluate == 0)
                to_save = last or step % job.cadence.checkpoint == 0
                behind = 0 if evaluate or to_save or (job.selection and job.selection.due(step)) else min(job.lag, 1)
                while len(in_flight) > behind:
                    planned = log.process(in_flight.popleft(), planned)
                with log.paused():
                    if evaluate or to_save:
                        log.check_state(step, bool(all_finite(state)))
                    if evaluate:
                        log.evaluated(step, job.evaluate(state.params))
                    if to_save:
                        save()
                        saved = step
                if last:
                    break
                state, plan, rows, planned, batch = upcoming()
        except preemption.StopRequested:
            # A later run decides again what was being decided.
            preempted = True
            while in_flight:
                planned = log.process(in_flight.popleft(), planned)
            if step > saved:
                log.check_state(step, bool(all_finite(state)))
                save()
        job.checkpoints.wait()
    return Outcome(step, preempted and step < job.cadence.train_step, log.tokens_seen, *log.rates())


def _start_fetch(metrics: dict[str, PyTree]) -> dict[str, PyTree]:
    for leaf in jax.tree.leaves(metrics):
        leaf.copy_to_host_async()
    return metrics
