"""JAX's connections to its service in process 0, led through the one port at which the processes meet.

So one port is all that must be open for them. And as a relay keeps them open on this side when process 0 is lost, JAX
does not abort the process before there is a line about the loss.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator

_GREETING = b'{"jax": true}\n'
_SECONDS = 5.0


def probe(connection: socket.socket) -> None:
    """Has the kernel notice within half a minute that the other host is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 10), ("KEEPINTVL", 5), ("KEEPCNT", 4), ("USER_TIMEOUT", 30_000)):
        if hasattr(socket, f"TCP_{name}"):  # not every system has them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def free_port() -> int:
    """A port of this host that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def from_others(server: socket.socket, port: int) -> None:
    """In process 0: leads JAX's connections that come to `server` to the service at `port`."""
    _in_background(_greeted(server), ("127.0.0.1", port), b"")


def to_process_0(address: tuple[str, int]) -> int:
    """In the others: a port of this host that leads to JAX's service in process 0, which meets others at `address`."""
    inside = socket.create_server(("127.0.0.1", 0))
    _in_background(_accepted(inside), address, _GREETING)
    return inside.getsockname()[1]


def _accepted(server: socket.socket) -> Iterator[socket.socket]:
    server.settimeout(None)
    while True:
        yield server.accept()[0]


def _greeted(server: socket.socket) -> Iterator[socket.socket]:
    for connection in _accepted(server):
        connection.settimeout(_SECONDS)
        with contextlib.suppress(OSError):
            if connection.recv(len(_GREETING), socket.MSG_WAITALL) == _GREETING:
                yield connection


def _in_background(connections: Iterator[socket.socket], to: tuple[str, int], greeting: bytes) -> None:
    threading.Thread(target=_relay, args=(connections, to, greeting), daemon=True).start()


def _relay(connections: Iterator[socket.socket], to: tuple[str, int], greeting: bytes) -> None:
    for connection in connections:
        try:
            there = socket.create_connection(to)
            there.sendall(greeting)
        except OSError:
            connection.close()  # JAX tries again
            continue
        for one in (connection, there):
            one.settimeout(None)
            probe(one)
        for source, sink in ((connection, there), (there, connection)):
            # What process 0 sends may end without a word; the side of the client stays open.
            threading.Thread(target=_pump, args=(source, sink, source is connection), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, ends: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    if ends:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
