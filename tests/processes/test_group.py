"""What a process does when another one says something, or is gone."""

import os
import queue

import jax
import pytest

from dataflex_jax import ending
from dataflex_jax.processes import group
from dataflex_jax.processes.launch import Launch


class _Other:
    """A link to another process, which says one thing."""

    host = "node2"

    def __init__(self, says):
        self.says, self.heard = says, []

    def receive(self):
        return self.says

    def send(self, **message):
        self.heard.append(message)


class _Ended(BaseException):
    pass


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """What the process ended with."""
    ends = queue.SimpleQueue()

    def now(code, line):
        ends.put((code, line))
        raise _Ended

    monkeypatch.setattr(ending, "now", now)
    monkeypatch.setattr(group, "_GRACE", 0)
    monkeypatch.setattr(group, "_joined", [])
    return ends


def _among(process: int, **others):
    links = {int(name[1:]): _Other(says) for name, says in others.items()}
    joined = group._Group(Launch("node1", 5, 3, process), links, [])
    group._joined.append(joined)
    return joined, links


def test_another_one_is_lost(ended):
    joined, links = _among(0, p1=None, p2={"done": True})
    group.at_loss(lambda: "last good checkpoint: run/checkpoints/8")
    with pytest.raises(_Ended):
        joined.watch(1)
    line = "process 1 of 3 (node2) was lost; last good checkpoint: run/checkpoints/8; start all of them again"
    assert ended.get() == (1, line)
    assert links[2].heard == [{"code": 1, "line": line}]  # who has a link to process 0 alone


def test_another_one_is_done():
    joined, _ = _among(1, p0={"done": True})
    joined.watch(0)


def test_another_one_fails_and_says_why(ended):
    joined, links = _among(0, p1={"code": 2, "line": "process 1 of 3: no such file"}, p2=None)
    with pytest.raises(_Ended):
        joined.watch(1)
    assert ended.get() == (2, "process 1 of 3: no such file")
    assert links[2].heard == [{"code": 2, "line": "process 1 of 3: no such file"}]


def test_what_the_others_are_told():
    _, links = _among(2, p0=None)
    assert group.failed(1, "a full disk")
    group.done()
    assert links[0].heard == [{"code": 1, "line": "process 2 of 3: a full disk"}, {"done": True}]


def test_alone_there_is_nobody_to_tell():
    assert not group.failed(1, "a full disk")
    group.done()
    group.wait_for_loss()


def test_a_proxy_of_the_environment_is_not_asked_for_this_host(monkeypatch):
    """gRPC would wait for it until the start's time is over."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv(group._NO_PROXY, "")
    monkeypatch.setenv("no_proxy", ".cluster")
    group._without_proxy()
    assert os.environ[group._NO_PROXY] == ".cluster,127.0.0.1"
