"""The progress line in logs and on terminals, and what counts as throughput."""

import io

import pytest

from dataflex_jax.reporting.progress import Progress, Throughput


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_progress_in_a_log_prints_a_line_now_and_then():
    file, clock = io.StringIO(), Clock()
    with Progress(1000, initial=100, seconds_between_lines=30, file=file, clock=clock) as progress:
        for step in range(101, 401):
            clock.now += 1.0
            progress.update(step, loss=2.0 + step / 1000, tokens_per_second=123_456.0)
        progress.message("checkpoint saved")
    lines = file.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "checkpoint saved"
    assert "130/1000" in lines[0]
    assert "loss 2.1300" in lines[0]
    assert "123k tokens/s" in lines[0]
    # 1 step/s, 600 steps to go.
    assert "400/1000" in lines[9]
    assert "<10:00" in lines[9]
    assert "1.00step/s" in lines[9]
    assert "\r" not in file.getvalue()


def test_progress_prints_the_last_state_once():
    file = io.StringIO()
    with Progress(3, file=file, clock=Clock()) as progress:
        progress.update(1)
        progress.update(2)
    assert [line.split(" [")[0] for line in file.getvalue().splitlines()] == [" 67% 2/3"]
    file = io.StringIO()
    with Progress(2, file=file, clock=Clock()) as progress:
        progress.update(2)
    assert file.getvalue().count("2/2") == 1


def test_progress_on_a_terminal_is_one_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    with Progress(10, initial=4, file=file) as progress:
        for step in range(5, 11):
            progress.update(step, loss=1.5)
        progress.message("saved")
    assert "saved\n" in file.getvalue()
    assert "10/10" in file.getvalue().splitlines()[-1]
    assert "loss 1.5000" in file.getvalue()


def test_throughput_leaves_out_the_first_step_and_what_is_excluded():
    clock = Clock()
    throughput = Throughput(flops_per_token=6e3, peak_flops=1e7, window=3, clock=clock)
    clock.now += 60.0
    throughput.update(1000)
    assert throughput.tokens_per_second is None
    assert throughput.mfu is None
    clock.now += 2.0
    throughput.update(1000)
    assert throughput.tokens_per_second == pytest.approx(500.0)
    assert throughput.mfu == pytest.approx(500.0 * 6e3 / 1e7)
    with throughput.excluded():
        clock.now += 1000.0
    clock.now += 2.0
    throughput.update(1000)
    assert throughput.tokens_per_second == pytest.approx(500.0)


def test_throughput_forgets_what_is_out_of_the_window():
    clock = Clock()
    throughput = Throughput(window=2, clock=clock)
    for seconds in (9.0, 9.0, 1.0, 3.0):
        clock.now += seconds
        throughput.update(100)
    assert throughput.tokens_per_second == pytest.approx(200 / 4)
    assert throughput.mfu is None
