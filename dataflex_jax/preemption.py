"""Noticing that the run is asked to stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequested(BaseException):
    """A request to stop in the middle of something long that a later run does again.

    No `Exception`, as `interruptible` raises it anywhere, also where a library would take it for a fault of its own.
    """


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Yields `requested(step)`: whether to save and stop now, the same answer at the same step on every host.

    One host: after SIGTERM, or a first Ctrl-C (a second one interrupts at once). Several: JAX's preemption service,
    which listens for SIGTERM on each of them and agrees on a step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with _handling(note):
        yield lambda step: bool(received)


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside it, a request to stop raises StopRequested at once; for work that a later run goes on with by itself.

    Several hosts agree at steps only; there it does nothing.
    """
    if jax.process_count() > 1:
        yield
        return

    def stop(number, _):
        raise StopRequested

    with _handling(stop):
        yield


def polling(requested: Callable[[int], bool]) -> Callable[[], None]:
    """A function for long work between two steps that raises StopRequested after a request.

    Several hosts agree at steps only; there it does nothing.
    """

    def poll() -> None:
        if jax.process_count() == 1 and requested(0):
            raise StopRequested

    return poll
