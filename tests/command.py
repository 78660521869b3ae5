"""The real command in processes of its own, on tests/tiny.py's data; compilations are shared between the processes."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import tiny

PROJECT = Path(__file__).parent.parent

# Dies like a `kill -9` at a chosen operation on a file: KILL_AT is a pattern for "event path path", as Python's audit
# events have them; they are raised right before the operation.
_RECIPE = """
import os, re, signal, sys
from pathlib import Path
from tests import tiny

pattern = os.environ.get("KILL_AT")

def kill(event, arguments):
    if event.startswith(("open", "os.", "shutil.")):
        words = [event, *(os.fspath(a) for a in arguments[:2] if isinstance(a, (str, os.PathLike)))]
        if re.search(pattern, " ".join(words)):
            os.kill(os.getpid(), signal.SIGKILL)

if pattern:
    sys.addaudithook(kill)

def get_config(mixer="odm"):
    return tiny.config(Path({root!r}), mixer, eval_every=4)
"""


class Trainer:
    """Starts `python -m dataflex_jax.train` on a recipe of tests/tiny.py, written to `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = tiny.write_domains(folder / "domains")
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(_RECIPE.format(root=str(self.root)))

    def start(
        self,
        *arguments: str,
        workdir: Path | None = None,
        config: str | None = None,
        devices: int = 1,
        prefix: tuple[str, ...] = (),
        **environment: str,
    ) -> subprocess.Popen:
        """The command with its streams as pipes; `arguments` such as "--config.seed=1"."""
        command = [*prefix, sys.executable, "-m", "dataflex_jax.train", f"--config={config or self.recipe}"]
        command += [f"--workdir={workdir}"] if workdir else []
        return subprocess.Popen(
            [*command, *arguments],
            cwd=PROJECT,
            env=self.environment(devices, **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def environment(self, devices: int = 1, **more: str) -> dict[str, str]:
        """Of the processes: the CPU, `devices` virtual ones."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compilations"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            **more,
        }

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """`start`, and wait for its end."""
        return finish(self.start(*arguments, **options))

    def done(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """`run`, which must end with exit code 0."""
        result = self.run(*arguments, **options)
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
        assert process.poll() is None, f"ended before its time with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.0005)


def lines(path: Path) -> int:
    """Complete lines of a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def the_error(result: subprocess.CompletedProcess) -> str:
    """The one line that begins with `error:`; no traceback is there."""
    assert "Traceback" not in result.stderr, result.stderr
    found = re.findall(r"^error: .*$", result.stderr, re.MULTILINE)
    assert len(found) == 1, result.stderr
    return found[0]
