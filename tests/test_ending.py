"""Ctrl-C at a command: one line, and the second one at once."""

import signal
import subprocess
import sys
import threading
from subprocess import PIPE

import pytest

from dataflex_jax import cli, ending
from dataflex_jax.errors import InputError
from dataflex_jax.processes import group
from tests.helpers.command import PROJECT

LINE = "error: stopped on request, before it was done\n"


def _python(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *arguments], cwd=PROJECT, stdout=PIPE, stderr=PIPE, text=True)


# The main thread waits in C, where handlers of Python's must wait too.
_BUSY = """
import ctypes, sys
from dataflex_jax import ending
ending.at_interrupts()
libc = ctypes.CDLL(None)
try:
    print("ready", flush=True)
    while True:
        for _ in range(20):
            libc.usleep(200_000)
        "".join(())
except KeyboardInterrupt:
    print("interrupted", flush=True)
    while True:
        libc.usleep(200_000)  # the signal itself ends one
"""


def test_the_first_interrupt_is_raised_and_the_second_ends_at_once():
    process = _python("-c", _BUSY)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (1, LINE)


def test_an_interrupt_while_the_command_is_imported():
    process = _python("-X", "importtime", "-m", "dataflex_jax.train", "--config=configs/base.py")
    for line in process.stderr:
        if line.endswith(" jax.version\n"):
            break
    process.send_signal(signal.SIGINT)
    *_, last = process.stderr
    assert process.wait(20) == 1
    assert last == LINE


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(ending, "_said", threading.Lock())
    monkeypatch.setattr(group, "_joined", [])


def _ends(call):
    with pytest.raises(SystemExit) as end:
        cli._reporting(call)
    return end.value.code


def test_an_interrupt_at_any_time_is_one_line(alone, capfd):
    def interrupted():
        raise KeyboardInterrupt

    assert _ends(interrupted) == 1
    assert capfd.readouterr().err == LINE


def test_the_last_line_is_printed_once(alone, capfd):
    def refused():
        ending.last_line("process 1 of 2 was lost")
        raise InputError("no such file")

    assert _ends(refused) == 2
    assert capfd.readouterr().err == "error: process 1 of 2 was lost\n"


def test_a_fault_of_the_program_keeps_its_traceback(alone, capfd):
    with pytest.raises(ZeroDivisionError):
        cli._reporting(lambda: 1 / 0)
    assert capfd.readouterr().err == ""
