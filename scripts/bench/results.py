"""What the benchmarks share: the machine in words, spreads, results as JSON and the page that shows them.

python scripts/bench/results.py [FOLDER]    # makes the page of docs/benchmarks anew, with files that were brought
"""

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

import jinja2
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = "docs/benchmarks"
# The benchmarks, whose results are files that begin with their names.
KINDS = (
    "memory",
    "step",
    "policies",
    "train_speed",
    "tests",
    "cross_entropy",
    "moe",
    "per_example_gradients",
    "less",
    "lds",
    "neighbours",
    "tsds",
    "nice",
    "resume",
    "mixing",
    "study",
    "swarm",
    "evaluate",
)


def describe(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a measurement ran on and how to repeat it.

    Args:
        resolved: the content of a run's config.json, or `training.run_config.resolved` of its configuration.
    """
    revision = resolved["git_revision"]
    unchanged = ["git", "-C", str(REPOSITORY), "diff", "--quiet", str(revision), "--", "dataflex_jax", "configs"]
    # A copy without .git can be told; what has changed since, it cannot know.
    told = os.environ.get("DATAFLEX_REVISION") or None
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "devices": resolved["devices"],
        "versions": resolved["versions"],
        "git_revision": revision or told,
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
    """Writes a result, and README.md beside it anew from all results of the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (path.parent / "README.md").write_text(page(path.parent))
    print(f"written to {path}; shown in {path.parent / 'README.md'}")


def page(folder: Path) -> str:
    """The page of a folder of results, by name: those of step.py are step*.json, and so on."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    found = {
        kind: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}*.json"))}
        for kind in KINDS
    }
    return environment.get_template("README.md.jinja").render(found, comparison=comparison)


def comparison(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of mixing.json as a Markdown table."""

    def cell(column: Mapping[str, Any], form: str) -> str:
        plus_minus = "" if column["std"] is None else f" ± {column['std']:.4f}"
        return f"{column['mean']:{form}}{plus_minus}"

    columns = list(next(iter(rows.values())))
    lines = [f"| held-out nll [nats/token] | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [cell(row[column], "+.4f" if "-" in column else ".4f") for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    of = Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / FOLDER)
    (of / "README.md").write_text(page(of))
