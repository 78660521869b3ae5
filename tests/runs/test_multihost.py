"""Several processes, as on several hosts: one job under jax.distributed, on virtual CPU devices."""

import collections
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.command import (
    FILES,
    PROJECT,
    Call,
    Starter,
    Trainer,
    copy_of,
    finish,
    number_of_lines,
    saved_steps,
    the_error,
    wait_until,
)

# Writes down what a process reads of the rows store and which files it opens for writing in its run folder.
_RECIPE = """
import os, sys
from pathlib import Path
from dataflex_jax.data.rows import DocumentRows
from tests.helpers import tiny

log = open(os.environ["LOG"], "w", buffering=1)
inside = next(arg.partition("=")[2] for arg in sys.argv if arg.startswith("--workdir=")) + "/"

def at_event(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(inside) and arguments[1] != "r":
        log.write(f"write {{arguments[0]}}\\n")

read = DocumentRows.row

def row(self, i):
    if not self.partial:  # not those for evaluation
        log.write(f"row {{Path(self._tokens.path).parent.name}} {{i}}\\n")
    return read(self, i)

DocumentRows.row = row
sys.addaudithook(at_event)
tiny.draw_nothing()

def get_config():
    return tiny.config(Path({root!r}), "odm", eval_every=4, model__num_hidden_layers=1)
"""


class Hosts(Trainer):
    """Starts the command in one process or in several, with logs of what each one read and wrote."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.recipe.write_text(_RECIPE.format(root=str(self.root)))
        self.starter = Starter(self)

    def _calls(self, *arguments, hosts: int, devices: int, workdir: Path, own=((), ())) -> list[Call]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        together = (f"--coordinator={address}", f"--num_processes={hosts}") if hosts > 1 else ()
        return [
            Call(
                (
                    f"--config={self.recipe}",
                    f"--workdir={workdir}",
                    *arguments,
                    *own[i],
                    *together,
                    *([f"--process_id={i}"] if together else []),
                ),
                self.environment(devices // hosts, {"LOG": str(self.log(workdir, i))}),
            )
            for i in range(hosts)
        ]

    def start_all(self, *arguments, folders=(PROJECT, PROJECT), **options) -> list[subprocess.Popen]:
        """`own`: further arguments of each process; `folders`: where each is started."""
        return [
            self.start(*call.arguments, config=None, cwd=folders[i], **call.environment)
            for i, call in enumerate(self._calls(*arguments, **options))
        ]

    def run_all(self, *arguments, **options) -> list[str]:
        """Their stdouts; they must end with exit code 0."""
        results = self.starter.together(self._calls(*arguments, **options))
        assert [result.returncode for result in results] == [0] * len(results), [r.stderr for r in results]
        return [re.sub(r"^\[Gloo\].*\n", "", result.stdout, flags=re.MULTILINE) for result in results]

    def log(self, workdir: Path, host: int) -> Path:
        return workdir.with_name(f"{workdir.name}-host{host}.log")

    def logged(self, workdir: Path, host: int, kind: str) -> list[str]:
        lines = self.log(workdir, host).read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(kind)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.starter.close()


@pytest.fixture(scope="module")
def alone(hosts, tmp_path_factory):
    """One process with two devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    hosts.run_all(hosts=1, devices=2, workdir=folder)
    return folder


@pytest.fixture(scope="module")
def two(hosts, tmp_path_factory):
    """The first 8 steps by two processes with one device each; they find the cache of rows stores empty."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = ("--config.train_step=8", f"--config.data.cache_dir={folder.parent / 'cache'}")
    folder.with_name("stdout").write_text("\n---\n".join(hosts.run_all(*options, hosts=2, devices=2, workdir=folder)))
    return folder


def assert_close(ours, expected, path="") -> None:
    """Equal but for rounding: numbers to 1e-5, everything else exactly."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(ours[key], value, f"{path}.{key}")
    elif isinstance(expected, float):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6, err_msg=path)
    else:
        assert ours == expected, path


def assert_same_run(run: Path, reference: Path) -> None:
    for name in FILES:
        ours, expected = tiny.records(run, name), tiny.records(reference, name)
        assert len(ours) == len(expected)
        for line, other in zip(ours, expected, strict=True):
            assert_close(line, other, f"{name}, step {other['step']}: ")


def test_two_processes_do_what_one_does(hosts, two, alone, tmp_path):
    run = copy_of(two, tmp_path / "run")
    hosts.run_all(hosts=2, devices=2, workdir=run)
    assert_same_run(run, alone)
    assert saved_steps(run) == [4, 8, 12]


def test_their_checkpoint_is_one_process_too(hosts, two, alone, tmp_path):
    run = copy_of(two, tmp_path / "run")
    hosts.run_all(hosts=1, devices=2, workdir=run)
    assert_same_run(run, alone)


def test_each_reads_its_own_rows_only(hosts, two, alone):
    first, second = (hosts.logged(two, host, "row") for host in (0, 1))
    assert len(first) == len(second) == 8 * 4
    assert collections.Counter(first + second) == collections.Counter(hosts.logged(alone, 0, "row")[: 8 * 8])


def test_the_first_one_alone_writes_beside_the_checkpoints(hosts, two):
    def written(host):
        paths = (Path(path).relative_to(two) for path in hosts.logged(two, host, "write"))
        return {path.parts[0] for path in paths}

    assert written(0) >= {"metrics.jsonl", "policy.jsonl", "eval.jsonl", "checkpoints"}
    assert written(1) == {"checkpoints"}
    first, second = two.with_name("stdout").read_text().split("\n---\n")
    assert "Held-out loss" in first
    assert second == ""


@pytest.mark.slow
def test_a_request_to_stop_one_of_them_stops_all_at_the_same_step(hosts, tmp_path):
    run = tmp_path / "run"
    endless = ("--config.train_step=100000", "--config.eval_every=0", "--config.checkpoint_every=100000")
    processes = hosts.start_all(*endless, hosts=2, devices=2, workdir=run)
    wait_until(lambda: number_of_lines(run / "metrics.jsonl") >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], [r.stderr for r in results]
    (step,) = saved_steps(run)
    assert number_of_lines(run / "metrics.jsonl") == step
    for result in results:
        assert f"Stopped on request after step {step}, saved;" in result.stdout


@pytest.mark.slow
def test_a_request_to_stop_all_of_them(hosts, tmp_path):
    run = tmp_path / "run"
    processes = hosts.start_all("--config.train_step=100000", hosts=2, devices=2, workdir=run)
    wait_until(lambda: number_of_lines(run / "metrics.jsonl") >= 3, processes[0])
    for process in processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert [finish(process).returncode for process in processes] == [0, 0]
    assert number_of_lines(run / "metrics.jsonl") == saved_steps(run)[-1]


@pytest.mark.slow
def test_eight_devices_of_two_processes(hosts, tmp_path):
    hosts.run_all(hosts=2, devices=8, workdir=tmp_path / "two")
    hosts.run_all(hosts=1, devices=8, workdir=tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_both_go_on_from_there(hosts, alone, tmp_path, victim):
    run = tmp_path / "run"
    processes = hosts.start_all(hosts=2, devices=2, workdir=run)
    wait_until(lambda: number_of_lines(run / "metrics.jsonl") >= 7, processes[0])
    processes[victim].kill()
    left = finish(processes[1 - victim], seconds=60)
    finish(processes[victim])
    assert left.returncode == 1
    line = rf"error: process {victim} of 2 \(.*\) was lost; last good checkpoint: .*/4; start all of them again"
    assert re.fullmatch(line, the_error(left))
    hosts.run_all(hosts=2, devices=2, workdir=run)
    assert_same_run(run, alone)


def refused_by_all(hosts, *arguments, **options) -> str:
    """The one line of all processes, which must end soon."""
    results = [finish(process, seconds=60) for process in hosts.start_all(*arguments, hosts=2, devices=2, **options)]
    assert [result.returncode for result in results] == [2, 2], [result.stderr for result in results]
    (line,) = {the_error(result) for result in results}
    return line.removeprefix("error: ")


@pytest.mark.slow
def test_processes_that_disagree_name_what_differs(hosts, tmp_path):
    root, folders = Path("domains"), (tmp_path / "one", tmp_path / "other")
    for folder in folders:
        tiny.write_domains(folder / root)
    with (folders[1] / root / "code.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    config = ((), ("--config.seed=7",))
    assert refused_by_all(hosts, workdir=tmp_path / "run", own=config).startswith(
        "config.seed is not the same in all processes: 42 (process 0); 7 (process 1); "
    )
    data = (f"--config.data.root={root}", f"--config.data.cache_dir={tmp_path / 'cache'}")
    assert refused_by_all(hosts, *data, workdir=tmp_path / "run", folders=folders).startswith(
        "the data of domain 'code' is not the same in all processes: "
    )
    elsewhere = (("--workdir=one",), ("--workdir=other",))
    assert refused_by_all(hosts, workdir=tmp_path / "run", own=elsewhere, folders=(tmp_path, tmp_path)).startswith(
        "--workdir=one: process 1 cannot see what process 0 writes there"
    )


@pytest.mark.slow
def test_going_on_with_other_proportions_by_two_processes(hosts, two, alone, tmp_path):
    runs = [copy_of(folder, tmp_path / name) for folder, name in ((two, "two"), (two, "one"))]
    for count, run in zip((2, 1), runs, strict=True):
        hosts.run_all("--config.data.proportions=(1.0,1.0,2.0)", hosts=count, devices=2, workdir=run)
    assert_same_run(*runs)
