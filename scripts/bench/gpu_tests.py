"""The tests that need a GPU, as a result: python scripts/bench/gpu_tests.py [--quick] [--seconds=N] [--output=FILE]

Without a GPU they run on the CPU, which shows that the tests themselves work. Where they take longer than --seconds,
the result has those that ended, and the command fails.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import results
from absl import flags

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.errors import TrainingError
from dataflex_jax.training import run_config

_QUICK = flags.DEFINE_bool("quick", False, "Only one of each kind.")
_SECONDS = flags.DEFINE_float("seconds", None, "Time after which no test goes on; None: as long as they take.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/gpu_tests.json", "The result.")

# One of a run, of losses, of a signal, of generation.
QUICK = "sketch or samplers0 or (float32 and False-False) or (mixes and odm) or (questions and less and not 4)"
_CORES_A_PROCESS = 4  # which compile the programs of a test at a time


def files() -> list[str]:
    """Those with tests that need a GPU: to look for them in all others takes as long as a few of them."""
    paths = sorted((results.REPOSITORY / "tests").rglob("test_*.py"))
    return [str(path.relative_to(results.REPOSITORY)) for path in paths if "pytest.mark.gpu" in path.read_text()]


def command(on_gpu: bool) -> list[str]:
    """Of pytest; in several processes, which take turns on the GPU, where pytest-xdist is installed."""
    processes = min(4, (os.cpu_count() or 1) // _CORES_A_PROCESS)
    at_once = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    chosen = ["-k", QUICK] if _QUICK.value else []
    pytest = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_outcomes"]
    return [*pytest, *at_once, *chosen, *(files() if on_gpu else ["tests/gpu"])]


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    on_gpu = jax.default_backend() == "gpu"
    scripts = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch, "outcomes.jsonl")
        outcomes.touch()
        environment = os.environ | {
            "JAX_PLATFORMS": "cuda,cpu" if on_gpu else "cpu",
            "DATAFLEX_GPU_TESTS": "run" if on_gpu else "dry",
            "GPU_OUTCOMES": str(outcomes),
            "PYTHONPATH": f"{scripts}:{os.environ.get('PYTHONPATH', '')}",
        }
        if on_gpu:  # its programs as users have them, not as the tests' are
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=3".strip()
        try:
            done = subprocess.run(
                command(on_gpu), cwd=results.REPOSITORY, env=environment, timeout=_SECONDS.value, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        found = [json.loads(line) for line in outcomes.read_text().splitlines()]
    tests: dict[str, Any] = {line.pop("test"): line for line in found}
    about = results.describe(run_config.resolved(base.get_config()))
    results.write(_OUTPUT.value, about | {"complete": code is not None, "tests": tests})
    if code is None:
        raise TrainingError(f"the time was enough for {len(tests)} tests")
    if code:
        raise TrainingError(f"{sum(test['outcome'] == 'failed' for test in tests.values())} tests fail")


if __name__ == "__main__":
    cli.run(main)
