"""How long a start takes: from the launch of the training command to its first finished step, fresh and on resume.

    python scripts/bench/resume.py [--few=20] [--many=2000] [--repeats=5] [-- --config.field=value ...]

The command is the real one in a process of its own: --config with a tiny model (so that taking many steps is cheap),
then what stands after `--`. It is stopped by SIGTERM after --few and after --many steps; each start is timed on a copy
of the run folder that this left, in turn forwards and backwards. The very first start, which also builds the rows store
and compiles, is timed once. A step counts as finished when its line is in policy.jsonl. Writes
docs/benchmarks/resume.json.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
from absl import flags

from dataflex_jax import cli

_CONFIG = flags.DEFINE_string("config", "configs/odm.py", "The recipe.")
_FEW = flags.DEFINE_integer("few", 20, "Steps taken before the first kind of resume.", lower_bound=1)
_MANY = flags.DEFINE_integer("many", 2000, "Steps taken before the second kind of resume.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Starts of each kind.", lower_bound=1)
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/resume.json", "The result.")

TINY = (
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_hidden_layers=2",
    "--config.data.seq_len=32",
    "--config.data.batch_size=8",
)
_POLL_SECONDS = 0.002


class Start(NamedTuple):
    """Wall time of a start up to the first finished step, and of its parts, in seconds.

    Attributes:
        total: launch to first finished step.
        data: launch to opened rows store: interpreter, imports, devices, data.
        state: from there to a state on the devices, initialised or restored.
        first_step: from there to the first finished step: compiling or fetching what is compiled, and running it.
    """

    total: float
    data: float
    state: float
    first_step: float


class Command:
    """One launch of the training command in `folder`."""

    def __init__(self, settings: Sequence[str], folder: Path):
        self._policy, self._config = folder / "policy.jsonl", folder / "config.json"
        self._before = self._size()
        self._opened: list[float] = []
        self._messages: list[str] = []
        self._launched = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dataflex_jax.train", *settings, f"--workdir={folder}"],
            cwd=results.REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stderr:
            self._messages.append(line)
            # The store is reported once it is open.
            if not self._opened and re.search(r"domain .*: train [\d,]+ documents", line):
                self._opened.append(time.time())

    def _size(self) -> int:
        return self._policy.stat().st_size if self._policy.exists() else 0

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._process.poll() is not None:
                self._reader.join()
                raise RuntimeError(f"the command ended early:\n{''.join(self._messages[-30:])}")
            time.sleep(_POLL_SECONDS)

    def first_step(self) -> Start:
        """Waits for the first finished step."""
        self._wait(lambda: self._size() > self._before)
        finished, placed = time.time(), self._config.stat().st_mtime
        marks = np.array([self._launched, self._opened[0], placed, finished])
        return Start(finished - self._launched, *np.diff(marks).tolist())

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def stop_after(self, steps: int) -> int:
        """Asks the run to save and stop once `steps` steps, one of them its own, are done; returns how many are."""
        self._wait(lambda: self._size() > self._before and self._policy.read_bytes().count(b"\n") >= steps)
        self._process.send_signal(signal.SIGTERM)
        self._end()
        if self._process.returncode != 0:
            raise RuntimeError(f"the command did not stop cleanly:\n{''.join(self._messages[-30:])}")
        return self._policy.read_bytes().count(b"\n")

    def _end(self) -> None:
        self._process.wait()
        self._reader.join()


def import_seconds() -> float:
    """Wall time of a process that only imports the trainer."""
    start = time.time()
    subprocess.run([sys.executable, "-c", "import dataflex_jax.train"], cwd=results.REPOSITORY, check=True)
    return time.time() - start


def summary(starts: Sequence[Start], steps_taken: int) -> dict[str, Any]:
    """The starts of one kind."""
    parts = {name: float(np.median([getattr(s, name) for s in starts])) for name in Start._fields[1:]}
    return {"steps_taken": steps_taken, "seconds": results.spread([s.total for s in starts]), "parts": parts}


def measure(settings: Sequence[str], scratch: Path) -> dict[str, Any]:
    """The result, but for printing it."""
    few, many = scratch / "few", scratch / "many"
    command = Command(settings, few)
    first = command.first_step()
    steps_few = command.stop_after(_FEW.value)
    shutil.copytree(few, many)
    steps_many = Command(settings, many).stop_after(_MANY.value)

    cases = {"fresh": (None, 0), "resumed_after_few": (few, steps_few), "resumed_after_many": (many, steps_many)}
    starts: dict[str, list[Start]] = {name: [] for name in cases}
    for i in range(_REPEATS.value):
        for name, (folder, _) in list(cases.items())[:: -1 if i % 2 else 1]:
            copy = scratch / f"{name}-{i}"
            if folder is not None:
                shutil.copytree(folder, copy)
            command = Command(settings, copy)
            starts[name].append(command.first_step())
            command.kill()
            shutil.rmtree(copy)
    ratios = [b.total / a.total for a, b in zip(starts["resumed_after_few"], starts["resumed_after_many"], strict=True)]
    return {
        **results.describe(json.loads((few / "config.json").read_text())),
        "settings": list(settings[:-1]),
        "imports_seconds": results.spread([import_seconds() for _ in range(3)]),
        "very_first": summary([first], 0),
        **{name: summary(starts[name], steps) for name, (_, steps) in cases.items()},
        "many_over_few": results.spread(ratios),
    }


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        never = 10 * _MANY.value + 10_000  # the last step, and the first regular checkpoint: not reached
        settings = [
            f"--config={_CONFIG.value}",
            *TINY,
            f"--config.train_step={never}",
            f"--config.checkpoint_every={never}",
            "--config.eval_every=0",
            *argv[1:],
            f"--config.data.cache_dir={scratch}/cache",
        ]
        result = measure(settings, Path(scratch))
    results.write(_OUTPUT.value, result)
    for name in ("very_first", "fresh", "resumed_after_few", "resumed_after_many"):
        case = result[name]
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in case["parts"].items())
        print(f"{name:18} ({case['steps_taken']} steps taken): {case['seconds']['median']:.2f} s  ({parts})")
    print(f"many / few: {result['many_over_few']['median']:.3f}, range {result['many_over_few']['range']}")


if __name__ == "__main__":
    cli.run(main)
