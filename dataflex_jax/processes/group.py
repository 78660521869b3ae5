"""The processes of a run while it lasts: each learns at once when another one ends before its work is done.

Every process keeps a connection to process 0. The kernel closes it when the process dies in whatever way, and where a
whole host goes, its probes notice within half a minute. So nothing depends on the main thread, which may wait for a
lost process in a collective for ever.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dataflex_jax import ending
from dataflex_jax.processes.launch import Launch, check_host
from dataflex_jax.processes.meeting import Link, meet

_GRACE = 5  # seconds in which a process that fails says so itself, or the loss behind its fault becomes known
_JAX_TIMEOUT = 600  # seconds of silence until JAX aborts; the connections here tell long before

_NO_PROXY = "no_grpc_proxy"  # the variable that gRPC reads


class _Group(NamedTuple):
    """This process among the others.

    Attributes:
        launch: which it is.
        links: to process 0; of process 0, to all others.
        standing: say what a line about a lost process ends with.
    """

    launch: Launch
    links: dict[int, Link]
    standing: list[Callable[[], str]]

    def tell(self, **message: Any) -> None:
        """Sends to all links."""
        for link in self.links.values():
            link.send(**message)

    def watch(self, process: int) -> None:
        """Returns when another process has done its work; ends this one when the other one fails."""
        link = self.links[process]
        message = link.receive()
        if message is None:
            lost = f"process {process} of {self.launch.count} ({link.host}) was lost"
            line = "; ".join([lost, *(describe() for describe in self.standing), "start all of them again"])
            self.tell(code=1, line=line)
            ending.now(1, line)
        if "line" in message:
            self.tell(**message)
            time.sleep(_GRACE)  # most faults are faults of all, and then each process says it itself
            ending.now(int(message["code"]), str(message["line"]))


_joined: list[_Group] = []  # one at most


def join(launch: Launch, seconds: int) -> None:
    """Meets the other processes and makes one JAX job of them.

    Args:
        launch: which process this is.
        seconds: how long to wait for those that have not come.

    Raises:
        InputError: a host without an address, a port that is taken, or numbers that do not fit together.
        TrainingError: not all came in time.
    """
    check_host(launch)
    links, port = meet(launch, seconds)
    group = _Group(launch, links, [])
    _joined.append(group)
    for process in links:
        threading.Thread(target=group.watch, args=(process,), daemon=True).start()
    _without_proxy()
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        launch.count,
        launch.process,
        local_device_ids=launch.device,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"127.0.0.1:{port}",
        heartbeat_timeout_seconds=_JAX_TIMEOUT,
    )


def _without_proxy() -> None:
    """The relay is on this host, where no proxy of the environment leads; JAX would wait for one, or warn of it."""
    others = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
    os.environ[_NO_PROXY] = ",".join(filter(None, [others, "127.0.0.1"]))
    jax.config.update("jax_check_proxy_envs", False)


def at_loss(describe: Callable[[], str]) -> None:
    """Has the line about a lost process say what `describe` returns, such as what is saved."""
    for group in _joined:
        group.standing.append(describe)


def done() -> None:
    """Tells the others that this one has done its work: its end is no loss."""
    for group in _joined:
        group.tell(done=True)


def failed(code: int, line: str) -> bool:
    """Tells the others that this one ends, and why; returns whether there are others."""
    for group in _joined:
        group.tell(code=code, line=f"process {group.launch.process} of {group.launch.count}: {line}")
    return bool(_joined)


def wait_for_loss() -> None:
    """After a fault that the loss of another process may have caused: returns if no such loss becomes known."""
    if _joined:
        time.sleep(_GRACE)
