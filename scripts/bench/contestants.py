"""Rivals of a benchmark, each in a process of its own, so that memory is counted apart; they measure in turns.

A rival is a context manager `make(task)`, importable by name, that sets up and yields (block, peak): `block(*request)`
returns the seconds that it took and `peak()` the process's peak memory so far as (bytes or None, of what). It may put
what else is to be known into task["about"].
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Peak = tuple[int | None, str]
Rival = Callable[[dict[str, Any]], AbstractContextManager[tuple[Callable[..., float], Callable[[], Peak]]]]


class Failed(Exception):
    """Why a rival cannot run, in one line; out of memory, say."""


class Contestant:
    """A rival in its process.

    Attributes:
        about: what it put into task["about"].
        peak: its peak memory after the latest block.

    Raises:
        Failed: it cannot start.
    """

    def __init__(self, make: Rival, task: dict[str, Any]):
        # Or the first JAX process would take most of a GPU's memory from the others.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.about = self._answer()
        self.peak: Peak = (None, "")

    def seconds(self, *request: Any) -> float:
        """Runs a block.

        Raises:
            Failed: it ran out of memory, say.
        """
        time.sleep(0.3)  # for the others' threads to go to sleep
        self._connection.send(request)
        answer = self._answer()
        self.peak = answer["peak"]
        return answer["seconds"]

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):  # it may have ended
            self._connection.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"its process ended with code {self._process.exitcode}") from None
        if isinstance(answer, Failed):
            raise answer
        return answer


def _serve(make: Rival, task: dict[str, Any], connection) -> None:
    """Answers requests until it is sent None."""
    try:
        with make(task) as (block, peak):
            connection.send(task.get("about"))
            while (request := connection.recv()) is not None:
                connection.send({"seconds": block(*request), "peak": peak()})
    except Exception as error:  # whatever it is, the process that asked says it
        connection.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


@contextlib.contextmanager
def _platform(task: dict[str, Any]):
    import jax

    task["about"] = jax.default_backend()
    yield None, None


def platform() -> str:
    """JAX's platform, found by a process that leaves the device alone afterwards."""
    probe = Contestant(_platform, {})
    probe.stop()
    return probe.about
