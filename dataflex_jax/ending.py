"""How a command ends: with one last line, whichever thread has cause to print it, and at once where Ctrl-C says so."""

import os
import signal
import threading
from typing import NoReturn

STOPPED = "stopped on request, before it was done"

_said = threading.Lock()  # taken for good by whoever prints the last line


def last_line(message: str) -> None:
    """Prints `error: MESSAGE`, unless another thread has printed such a line."""
    if _said.acquire(blocking=False):
        # Not by sys.stderr: a signal's handler may have interrupted a write to it.
        os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))


def now(code: int, message: str) -> NoReturn:
    """Ends the process from any thread, with `last_line` and without waiting for anything."""
    if os.isatty(2):
        os.write(2, b"\n")  # below a progress bar
    last_line(message)
    os._exit(code)


def at_interrupts_while_importing() -> None:
    """Ctrl-C ends the process at once: nothing has begun."""
    signal.signal(signal.SIGINT, lambda *_: now(1, STOPPED))


def at_interrupts() -> None:
    """The first Ctrl-C raises KeyboardInterrupt in the main thread, or does what is set for it later.

    The second one ends the process at once. A thread counts them, as the main thread may be busy, with a compilation
    for instance, where Python's handlers have to wait.
    """
    received, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(received,), daemon=True).start()
    signal.signal(signal.SIGINT, _raise_once)


def _count(received: int) -> None:
    interrupts = 0
    while interrupts < 2:
        interrupts += os.read(received, 1)[0] == signal.SIGINT
    now(1, STOPPED)


def _raise_once(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, lambda *_: None)
    raise KeyboardInterrupt
