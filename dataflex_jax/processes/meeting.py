"""How the processes of a run meet: all others come to process 0, in time, with numbers that fit together."""

import contextlib
import json
import logging
import socket
import time
from typing import Any

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.processes import relay
from dataflex_jax.processes.launch import Launch

logger = logging.getLogger(__name__)

_LINE = 1 << 16  # bytes of a message at most
_GREETING = 5.0  # seconds
_TOGETHER = "start all of them at the same time, or set a longer --start_timeout"


class Link:
    """A connection to another process: a JSON object a line, in both directions.

    Attributes:
        host: the other one's.
    """

    def __init__(self, connection: socket.socket, host: str = ""):
        relay.probe(connection)
        self.host, self._connection = host, connection
        self._lines = connection.makefile("rb")

    def send(self, **message: Any) -> None:
        """Sends, unless the other one is gone, which whoever receives from it notices."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None: the other one is gone, silent for `seconds`, or no process of a run."""
        self._connection.settimeout(seconds)
        try:
            message = json.loads(self._lines.readline(_LINE) or b"null")
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None


def meet(launch: Launch, seconds: int) -> tuple[dict[int, Link], int]:
    """Waits until all processes are there.

    Args:
        launch: which process this is.
        seconds: how long to wait.

    Returns:
        In process 0 a link to each other one, in the others one to process 0; and a port of this host: that at which
        JAX's service is to listen in process 0, in the others one that leads there.

    Raises:
        InputError: a port that is taken, or numbers that do not fit together; on all that have come.
        TrainingError: not all came in time; on all that have.
    """
    end = time.monotonic() + seconds
    return _as_host(launch, end, seconds) if launch.process == 0 else _as_guest(launch, end, seconds)


def _as_host(launch: Launch, end: float, seconds: int) -> tuple[dict[int, Link], int]:
    server = _listening(launch)
    missing = set(range(1, launch.count))
    logger.info("waiting at %s for %s, at most %d s", launch.address, _named(missing, launch.count), seconds)
    links: dict[int, Link] = {}
    while missing:
        link = _next(server, end)
        if link is None:
            line = f"{_named(missing, launch.count)} did not come to {launch.address} within {seconds} s; {_TOGETHER}"
            _refuse(links, 1, line)
            raise TrainingError(line)
        greeting = link.receive(_GREETING) or {}
        if not {"process", "count", "host"} <= greeting.keys():
            continue  # whoever that was
        process, link.host = greeting["process"], greeting["host"]
        if fault := _misfit(process, greeting["count"], link.host, missing, launch):
            _refuse(links | {-1: link}, 2, fault)
            raise InputError(fault)
        missing.remove(process)
        links[process] = link
    port = relay.free_port()
    relay.from_others(server, port)
    for link in links.values():
        link.send(all=True)
    return links, port


def _listening(launch: Launch) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", launch.port), family=family, dualstack_ipv6=dual, backlog=launch.count)
    except OSError as error:
        reason = f"process 0 cannot listen there ({error.strerror}); choose another port"
        raise InputError(f"{launch.address}: {reason}") from error


def _next(server: socket.socket, end: float) -> Link | None:
    server.settimeout(max(0.01, end - time.monotonic()))
    try:
        return Link(server.accept()[0])
    except TimeoutError:
        return None


def _misfit(process: Any, count: Any, host: str, missing: set[int], launch: Launch) -> str | None:
    if count != launch.count:
        return (
            f"process {process} ({host}) is one of {count}, process 0 one of {launch.count}: give all the same number"
        )
    if process not in missing:
        return f"two processes have the number {process}, one of them on {host}: give each its own"
    return None


def _refuse(links: dict[int, Link], code: int, line: str) -> None:
    for link in links.values():
        link.send(code=code, line=line)


def _named(processes: set[int], count: int) -> str:
    numbers = sorted(processes)
    listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {listed} of {count}"


def _as_guest(launch: Launch, end: float, seconds: int) -> tuple[dict[int, Link], int]:
    logger.info("waiting at %s for process 0 of %d, at most %d s", launch.address, launch.count, seconds)
    link = Link(_reached(launch, end, seconds), launch.host)
    link.send(process=launch.process, count=launch.count, host=socket.gethostname())
    # A little longer than process 0 waits, which says for whom it has waited.
    reply = link.receive(end - time.monotonic() + _GREETING)
    if reply is None:
        raise TrainingError(f"{launch.address}: process 0 has ended, or what listens there is none; start all again")
    if "line" in reply:
        raise (InputError if reply["code"] == 2 else TrainingError)(reply["line"])
    return {0: link}, relay.to_process_0((launch.host, launch.port))


def _reached(launch: Launch, end: float, seconds: int) -> socket.socket:
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection((launch.host, launch.port), timeout=left)
        except OSError:
            time.sleep(0.1)  # it does not listen yet
    raise TrainingError(f"process 0 of {launch.count} did not come to {launch.address} within {seconds} s; {_TOGETHER}")
