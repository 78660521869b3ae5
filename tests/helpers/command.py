"""The real command in processes of its own, on tiny.py's data; they share what they compile."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.helpers import tiny

PROJECT = Path(__file__).parents[2]
FILES = ("metrics.jsonl", "policy.jsonl", "eval.jsonl")

# The process sends itself SIGNAL, once, right before a chosen operation on a file. SIGNAL_AT is a pattern for
# "event path path" of Python's audit events.
_RECIPE = """
import os, re, signal, sys
from pathlib import Path
from tests.helpers import tiny

pattern = os.environ.get("SIGNAL_AT")

def at_event(event, arguments):
    global pattern
    if pattern and event.startswith(("open", "os.", "shutil.")):
        paths = (os.fspath(a) for a in arguments[:2] if isinstance(a, (str, os.PathLike)))
        if re.search(pattern, " ".join([event, *paths])):
            pattern = None
            os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])

if pattern:
    sys.addaudithook(at_event)

tiny.draw_nothing()

def get_config(mixer="odm"):
    return tiny.config(Path({root!r}), mixer, eval_every=4)
"""


class Trainer:
    """Starts `python -m dataflex_jax.train` on a recipe like tiny.py's, which it writes to `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = tiny.write_domains(folder / "domains")
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(_RECIPE.format(root=str(self.root)))

    def environment(self, devices: int, more: dict[str, str]) -> dict[str, str]:
        """The CPU, as `devices` virtual ones."""
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            **more,
        }

    def start(
        self,
        *arguments: str,
        workdir: Path | None = None,
        config: str | Path | None = "",
        devices: int = 1,
        cwd: str | Path = PROJECT,
        prefix: tuple[str, ...] = (),
        **environment: str,
    ) -> subprocess.Popen:
        """The command with pipes for its streams.

        Args:
            arguments: such as "--config.seed=1".
            workdir: the run folder.
            config: "" for the recipe of this class; None for no --config.
            devices: how many virtual ones.
            cwd: the working directory.
            prefix: a command that runs the command.
            environment: variables.
        """
        config = self.recipe if config == "" else config
        recipe = [] if config is None else [f"--config={config}"]
        folder = [] if workdir is None else [f"--workdir={workdir}"]
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "dataflex_jax.train", *recipe, *folder, *arguments],
            cwd=cwd,
            env=self.environment(devices, environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """`start`, and wait for the end."""
        return finish(self.start(*arguments, **options))

    def done(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """`run`, which must end with exit code 0."""
        return successful(self.run(*arguments, **options))


# A fork that ends searches all objects for garbage, which copies their pages; but not those that are frozen.
_STARTER = """
import gc, json, os, runpy, sys
import dataflex_jax.select, dataflex_jax.train
from dataflex_jax.policies import registry

registry.load_plugins(())
module = sys.argv[1]
del sys.modules[module]
gc.collect()
gc.freeze()
for line in sys.stdin:
    children = []
    for arguments, environment, out, err in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(environment)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__")
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Call(NamedTuple):
    """One start of a command: its arguments and further variables of its environment, but for those of imports."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = {}


class Starter:
    """Runs a command many times at a tenth of the cost: each is a fork of one process that has imported it all.

    Close it in the end.

    Args:
        trainer: whose environment to use.
        module: the command.
        devices: how many virtual ones.
    """

    def __init__(self, trainer: Trainer, module: str = "dataflex_jax.train", devices: int = 1):
        self._trainer = trainer
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _STARTER, module],
            cwd=PROJECT,
            env=trainer.environment(devices, {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def together(self, calls: Sequence[Call]) -> list[subprocess.CompletedProcess]:
        """Several at the same time; returns when all have ended."""
        streams = [[str(self._trainer.folder / f"starter-{i}.{n}") for n in ("out", "err")] for i in range(len(calls))]
        lines = [[*call, *files] for call, files in zip(calls, streams, strict=True)]
        self._process.stdin.write(json.dumps(lines) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [
            subprocess.CompletedProcess(call.arguments, code, *(Path(file).read_text() for file in files))
            for call, code, files in zip(calls, codes, streams, strict=True)
        ]

    def run(
        self, *arguments: str, workdir: Path | None = None, config: str | Path = "", **environment: str
    ) -> subprocess.CompletedProcess:
        """As `Trainer.run`."""
        folder = [] if workdir is None else [f"--workdir={workdir}"]
        (result,) = self.together(
            [Call([f"--config={config or self._trainer.recipe}", *folder, *arguments], environment)]
        )
        return result

    def done(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """`run`, which must end with exit code 0."""
        return successful(self.run(*arguments, **options))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)


_CALLS = """
import gc, importlib, json, os, runpy, sys
from dataflex_jax.__main__ import COMMANDS
from dataflex_jax.policies import registry

registry.load_plugins(())
for command in COMMANDS:
    importlib.import_module(f"dataflex_jax.{command}")
gc.collect()
gc.freeze()
codes = []
for number, (module, *arguments) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.modules.pop(module, None)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def in_forks(trainer: Trainer, folder: Path, calls: Sequence[tuple[str, ...]]) -> list[subprocess.CompletedProcess]:
    """Runs commands, each (module, argument ...) in a fork of one process, which imports once.

    Args:
        trainer: whose environment to use.
        folder: an empty one, where they run.
        calls: the commands.
    """
    process = [sys.executable, "-W", "ignore", "-c", _CALLS, json.dumps(calls)]
    done = subprocess.run(
        process, cwd=folder, env=trainer.environment(1, {}), stdout=subprocess.PIPE, check=True, timeout=600
    )
    return [
        subprocess.CompletedProcess(call, code, *((folder / f"{i}.{n}").read_text() for n in ("out", "err")))
        for i, (call, code) in enumerate(zip(calls, json.loads(done.stdout), strict=True))
    ]


def successful(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """What ended with exit code 0."""
    assert result.returncode == 0, result.stderr
    return result


def finish(process: subprocess.Popen, seconds: float = 300) -> subprocess.CompletedProcess:
    """Waits for a process and collects what it printed."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> None:
    """Returns as soon as `condition` holds, while `process` still runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.0005)


def number_of_lines(path: Path) -> int:
    """Complete lines of a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def the_error(result: subprocess.CompletedProcess) -> str:
    """The only line that begins with `error:`; there is no traceback."""
    assert "Traceback" not in result.stderr, result.stderr
    errors = re.findall(r"^error: .*$", result.stderr, re.MULTILINE)
    assert len(errors) == 1, result.stderr
    return errors[0]


def saved_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    folder = run_folder / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy_of(run_folder: Path, to: Path) -> Path:
    """A copy of a run to go on from."""
    return Path(shutil.copytree(run_folder, to))


def assert_same_curves(run_folder: Path, reference: Path, files: Sequence[str] = FILES) -> None:
    """The lines of metrics, policy and evaluations are equal to the bit, but for what depends on the clock."""
    for name in files:
        ours, expected = tiny.records(run_folder, name), tiny.records(reference, name)
        assert [line["step"] for line in ours] == [line["step"] for line in expected]
        assert ours == expected
