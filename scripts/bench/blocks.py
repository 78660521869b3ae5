"""Blocks of steps of the project's own loop, on parameters that several runs train in turns."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from dataflex_jax.data import sampler as sampling
from dataflex_jax.data.sampler import SamplerState
from dataflex_jax.json_lines import Written
from dataflex_jax.training import loop
from dataflex_jax.training.checkpoint import Contents
from dataflex_jax.training.job import Cadence, Job
from dataflex_jax.training.ledger import Position
from dataflex_jax.training.state import TrainState


class Contestant(NamedTuple):
    """A run: the job, and what its policies keep from one of its blocks to the next."""

    job: Job
    mixer: PyTree
    weighters: tuple[PyTree, ...]
    sampler: SamplerState


class Block(NamedTuple):
    """A block's tokens/s, and for its second half the wall time and the main thread's CPU time in seconds a step."""

    tokens_per_second: float
    step_seconds: float
    main_thread_seconds: float


class Kept:
    """Stands in for a run's checkpoints: keeps the last state in memory."""

    def save(self, step: int, contents: Contents) -> None:
        sampler = contents.run["sampler"]
        self.state, self.sampler = contents.state, sampling.from_json(sampler, tuple(sampler["cursors"]))

    def lines(self, step: int) -> dict[str, Written]:
        return {}

    def wait(self) -> None:
        pass

    def last_good(self) -> str:
        return "a benchmark keeps no checkpoint"


class Clocked:
    """The train step, noting when it is called and the CPU time of the calling thread."""

    def __init__(self, step: Callable):
        self._step = step
        self.calls: list[tuple[float, float]] = []

    def __call__(self, state: TrainState, batch: PyTree):
        self.calls.append((time.perf_counter(), time.thread_time()))
        return self._step(state, batch)

    def seconds_a_step(self) -> np.ndarray:
        """Wall time, and CPU time of the thread, between calls; those of the second half of the block."""
        half = np.array(self.calls[len(self.calls) // 2 :])
        return (half[-1] - half[0]) / (len(half) - 1)


def run_block(of: Contestant, state: TrainState, steps: int, folder: Path) -> tuple[Block, Contestant, TrainState]:
    """`steps` steps of the loop, from the shared state and the contestant's own policy and data position."""
    done = int(state.step)
    last = done + steps
    kept, step = Kept(), Clocked(of.job.step)
    job = of.job._replace(
        step=step,
        checkpoints=kept,
        evaluators=(),
        cadence=Cadence(last, last),
        log=of.job.log._replace(train_step=last),
    )
    position = Position(of.sampler._replace(step=done), 0, np.zeros(len(of.job.log.domains), np.int64))
    outcome = loop.run(job, state._replace(mixer=of.mixer, weighters=of.weighters), position, folder)
    block = Block(outcome.tokens_per_second, *step.seconds_a_step().tolist())
    after = of._replace(mixer=kept.state.mixer, weighters=kept.state.weighters, sampler=kept.sampler)
    return block, after, kept.state
