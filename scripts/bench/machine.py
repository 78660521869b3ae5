"""What the benchmarks share: the machine in words, results as JSON, spreads."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = "docs/benchmarks"


def describe(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a measurement ran on and how to repeat it.

    Args:
        resolved: the content of a run's config.json, or `dataflex_jax.config.resolved` of its configuration.
    """
    revision = resolved["git_revision"]
    measured_code = ("dataflex_jax", "configs", "scripts/bench")
    unchanged = ["git", "-C", str(REPOSITORY), "diff", "--quiet", str(revision), "--", *measured_code]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "devices": resolved["devices"],
        "versions": resolved["versions"],
        "git_revision": revision,
        "modified_since": subprocess.run(unchanged, check=False).returncode != 0 if revision else None,
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, range and the values themselves."""
    low, first, median, third, high = np.percentile(values, [0, 25, 50, 75, 100])
    return {
        "median": float(median),
        "quartiles": [float(first), float(third)],
        "range": [float(low), float(high)],
        "values": [float(value) for value in values],
    }


def write(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a result, with its folder, and says where it is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"written to {path}")
