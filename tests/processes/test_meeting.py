"""How processes meet; those of these tests are threads of one."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.processes import relay
from dataflex_jax.processes.launch import Launch
from dataflex_jax.processes.meeting import Link, meet


@pytest.fixture
def port():
    return relay.free_port()


@pytest.fixture
def together(port):
    """Has processes meet; what each returns, or raises."""

    def meeting(*numbers: tuple[int, int], seconds: float = 20):
        def one(process, count):
            try:
                return meet(Launch("localhost", port, count, process), seconds)
            except (InputError, TrainingError) as error:
                return error

        with ThreadPoolExecutor(len(numbers)) as pool:
            return list(pool.map(lambda number: one(*number), numbers))

    return meeting


def test_all_come(together):
    (links, service), (to_first, inside), (_, other) = together((0, 3), (1, 3), (2, 3))
    assert sorted(links) == [1, 2]
    assert list(to_first) == [0]
    assert len({service, inside, other}) == 3
    links[1].send(hello=1)
    assert to_first[0].receive(5) == {"hello": 1}
    to_first[0].send(hello=2)
    assert links[1].receive(5) == {"hello": 2}


def test_one_that_never_comes_is_named_by_all_that_have(together, port):
    begin = time.monotonic()
    errors = together((0, 3), (2, 3), seconds=1)
    assert time.monotonic() - begin < 10
    assert {type(error) for error in errors} == {TrainingError}
    for error in errors:
        assert str(error).startswith(f"process 1 of 3 did not come to localhost:{port} within 1 s; start all of them")


def test_process_0_never_comes(together, port):
    (error,) = together((1, 2), seconds=1)
    assert isinstance(error, TrainingError)
    assert str(error).startswith(f"process 0 of 2 did not come to localhost:{port} within 1 s")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (((0, 2), (1, 3)), "process 1 ({host}) is one of 3, process 0 one of 2: give all the same number"),
        (((0, 3), (1, 3), (1, 3)), "two processes have the number 1, one of them on {host}: give each its own"),
    ],
)
def test_numbers_that_do_not_fit_together_are_named_by_all(together, numbers, message):
    errors = together(*numbers)
    assert {type(error) for error in errors} == {InputError}
    assert {str(error) for error in errors} == {message.format(host=socket.gethostname())}


def test_a_port_that_is_taken(together, port):
    with socket.create_server(("", port)):
        (error,) = together((0, 2), seconds=1)
    assert isinstance(error, InputError)
    assert str(error).startswith(f"localhost:{port}: process 0 cannot listen there (")


def test_strangers_at_the_port_are_ignored(together, port):
    def knock(words):
        while True:
            try:
                stranger = socket.create_connection(("localhost", port))
                break
            except OSError:
                time.sleep(0.01)
        stranger.sendall(words)
        stranger.close()

    strangers = [threading.Thread(target=knock, args=(words,)) for words in (b"GET /\r\n", b"[]\n", b"\xff\n", b"")]
    for stranger in strangers:
        stranger.start()
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(meet, Launch("localhost", port, 2, 0), 20)
        for stranger in strangers:
            stranger.join()
        meet(Launch("localhost", port, 2, 1), 20)
        assert list(host.result()[0]) == [1]


def test_what_answers_is_no_process(port):
    with socket.create_server(("", port)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0\r\n"), daemon=True).start()
        with pytest.raises(
            TrainingError, match=f"localhost:{port}: process 0 has ended, or what listens there is none"
        ):
            meet(Launch("localhost", port, 2, 1), 5)


def test_the_relay_hides_that_process_0_is_gone_and_nothing_else(together):
    """JAX's client would abort its process as soon as its connection ends."""
    (_, service), (_, inside) = together((0, 2), (1, 2))
    with socket.create_server(("127.0.0.1", service)) as server:
        client = socket.create_connection(("127.0.0.1", inside))
        client.sendall(b"question")
        served = server.accept()[0]
        assert served.recv(8, socket.MSG_WAITALL) == b"question"
        served.sendall(b"answer")
        assert client.recv(6, socket.MSG_WAITALL) == b"answer"
        served.close()
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_link_whose_other_side_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = Link(socket.create_connection(server.getsockname()))
        other = server.accept()[0]
    other.close()
    assert one.receive() is None
    one.send(hello=1)
    one.send(hello=2)
