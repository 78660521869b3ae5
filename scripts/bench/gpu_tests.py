"""The tests that need a GPU, as a result: python scripts/bench/gpu_tests.py [--quick] [--output=FILE]

Without a GPU they run on the CPU, which shows that the tests themselves work.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import jax
import results
from absl import flags

from dataflex_jax import cli
from dataflex_jax.configs import base
from dataflex_jax.errors import TrainingError
from dataflex_jax.training import run_config

_QUICK = flags.DEFINE_bool("quick", False, "Only those of signals and generation.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/gpu_tests.json", "The result.")


def outcomes(report: Path) -> dict[str, dict[str, Any]]:
    """By test: its seconds, and what came of it."""
    found = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = ended.pop() if ended else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = {
            "seconds": float(case.get("time")),
            "outcome": outcome,
        }
    return found


def main(argv: list[str]) -> None:
    cli.no_positional(argv)
    platforms = "cuda,cpu" if jax.default_backend() == "gpu" else "cpu"
    environment = os.environ | {"JAX_PLATFORMS": platforms, "DATAFLEX_GPU_TESTS": "run" if "," in platforms else "dry"}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        chosen = ["-k", "signals or generated"] if _QUICK.value else []
        chosen += ["tests/gpu"] if platforms == "cpu" else []  # others are for a GPU's libraries alone
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        code = subprocess.run([*command, *chosen], cwd=results.REPOSITORY, env=environment, check=False).returncode
        found = outcomes(report)
    results.write(_OUTPUT.value, results.describe(run_config.resolved(base.get_config())) | {"tests": found})
    if code:
        raise TrainingError(f"{sum(test['outcome'] in ('failure', 'error') for test in found.values())} tests fail")


if __name__ == "__main__":
    cli.run(main)
