"""DoReMi in one command: reference, proxy and target, and the target's twin on the reference proportions.

    python scripts/doremi.py --workdir=runs/doremi [--scale=quickstart] [--rounds=1] [--threshold=0.01]
        [-- --config.field=value ...]

Every run is the real command, `python -m dataflex_jax.train --config=configs/doremi.py:ROLE,SCALE`, with what stands
after `--`. What is done is skipped, what was interrupted goes on. The reference run is the target's baseline where
both have the same model. With several rounds, the next reference trains on the weights of the last proxy, until no
weight moves by more than the threshold. Options for one role alone, repeatable: --reference=..., --proxy=... and
--target=--config.model.hidden_size=512.

At the end: a table of the weights and of the held-out losses of target and baseline, also in WORKDIR/doremi.json.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dataflex_jax import cli
from dataflex_jax.errors import TrainingError
from dataflex_jax.files import to_json
from dataflex_jax.json_lines import read_jsonl
from dataflex_jax.reporting.evaluations import evaluations
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.training import run_config
from dataflex_jax.training.domain_weights import read_weights

_WEIGHTS = "domain_weights.json"
COLUMNS = ("baseline proportions", "DoReMi weights", "baseline nll", "target nll")

_WORKDIR = cli.define_path("workdir", "runs/doremi", "The folder of all runs.")
_SCALE = flags.DEFINE_string("scale", "quickstart", "One of configs/scales.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "At most so many rounds of reference and proxy.", lower_bound=1)
_THRESHOLD = flags.DEFINE_float("threshold", 0.01, "Rounds end when no weight moves by more.", lower_bound=0.0)
_OPTIONS = {
    role: flags.DEFINE_multi_string(role, [], f"An option of the {role} run alone.")
    for role in ("reference", "proxy", "target")
}


def train(role: str, folder: Path, options: Sequence[str]) -> None:
    """Runs one role to its end, unless it has been.

    Raises:
        TrainingError: the run failed, or was asked to stop.
    """
    if (folder / "summary.json").exists():
        print(f"{role}: done, {folder}")
        return
    print(f"{role}: {folder}", flush=True)
    command = [sys.executable, "-m", "dataflex_jax.train", f"--config=configs/doremi.py:{role},{_SCALE.value}"]
    process = subprocess.Popen([*command, f"--workdir={folder}", *options])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C has reached it too, and it is saving
        raise
    if code or not (folder / "summary.json").exists():
        raise TrainingError(f"the {role} run ended with exit code {code}; the same command goes on from there")


def rounds(workdir: Path, shared: Sequence[str]) -> tuple[Path, Path]:
    """Runs reference and proxy until the weights settle; returns the first reference and the last proxy."""
    before: tuple[float, ...] | None = None
    sampling: list[str] = []
    for number in range(1, _ROUNDS.value + 1):
        folder = workdir if _ROUNDS.value == 1 else workdir / f"round{number}"
        reference, proxy = folder / "reference", folder / "proxy"
        train("reference", reference, [*shared, *sampling, *_OPTIONS["reference"].value])
        model = f"--config.mixer.reference={reference}"
        train("proxy", proxy, [*shared, model, *_OPTIONS["proxy"].value])
        weights = read_weights(proxy / _WEIGHTS, list(drawn_with(proxy)))
        if before is not None:
            moved = max(abs(now - then) for now, then in zip(weights, before, strict=True))
            print(f"round {number}: the weights moved by at most {moved:.4f}")
            if moved <= _THRESHOLD.value:
                break
        before, sampling = weights, [f"--config.mixer.proportions={proxy / _WEIGHTS}"]
    return (workdir if _ROUNDS.value == 1 else workdir / "round1") / "reference", proxy


def final(folder: Path) -> dict[str, Any]:
    """A run's last evaluation on held-out rows."""
    return evaluations(RunRecords.load(folder))[-1]


def drawn_with(folder: Path) -> dict[str, float]:
    """The proportions that a run sampled with."""
    return read_jsonl(folder / "policy.jsonl")[-1]["sampling_weights"]


def comparison(baseline: Path, target: Path) -> dict[str, dict[str, float]]:
    """Proportions and held-out losses of both runs, a row for each domain and one overall; without held-out rows a
    domain has no losses."""
    before, after = drawn_with(baseline), drawn_with(target)
    rows = {name: {COLUMNS[0]: before[name], COLUMNS[1]: after[name]} for name in after} | {"overall": {}}
    theirs, ours = (final(run)["domains"] | {"overall": final(run)["overall"]} for run in (baseline, target))
    for name, row in rows.items():
        if theirs.get(name) and ours.get(name):
            row |= {COLUMNS[2]: theirs[name]["nll"], COLUMNS[3]: ours[name]["nll"]}
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as aligned text."""
    lines = [f"{'domain':16}" + "".join(f"{column:>22}" for column in COLUMNS)]
    for name, row in rows.items():
        texts = [f"{row[column]:22.4f}" if column in row else " " * 22 for column in COLUMNS]
        lines.append(f"{name:16}" + "".join(texts))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    workdir, shared = Path(_WORKDIR.value).resolve(), argv[1:]
    reference, proxy = rounds(workdir, shared)
    target = workdir / "target"
    weights = f"--config.mixer.proportions={proxy / _WEIGHTS}"
    train("target", target, [*shared, weights, *_OPTIONS["target"].value])
    baseline = reference
    if run_config.read(reference).model != run_config.read(target).model:
        baseline = workdir / "baseline"
        train("baseline", baseline, [*shared, *_OPTIONS["target"].value])
    rows = comparison(baseline, target)
    (workdir / "doremi.json").write_text(to_json(rows, indent=2) + "\n")
    print(table(rows))
    print(f"Written to {workdir / 'doremi.json'}; the weights are {proxy / _WEIGHTS}.")


if __name__ == "__main__":
    cli.run(main, unknown_flags="options of the runs stand after --, as in: doremi.py -- --config.seed=1")
