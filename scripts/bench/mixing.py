"""Does mixing help? Static, ODM, ADO and DoReMi on seven domains: held-out loss by domain, same seeds and tokens.

    nice python scripts/bench/mixing.py [--root=DIR] [--steps=300] [--seeds=0,1,2] [-- --config.field=value ...]

Every run is the real command, `python -m dataflex_jax.train --config=configs/MIXER.py:local`, with what stands after
`--`; its folder is under --runs. DoReMi's reference is the static run of the same seed, and its proxy has the same
model and tokens, so it costs two runs in place of one. A finished run is not repeated and an interrupted one goes on,
so the command may be stopped and started at will. Writes docs/benchmarks/mixing.json and mixing.png.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dataflex_jax import cli
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.reporting.evaluations import evaluations
from dataflex_jax.reporting.plot_style import LIGHT, LineStyle, label, legend, line_styles, new_figure
from dataflex_jax.reporting.run_folder import RunRecords

MIXERS = {"static": "static", "odm": "ODM", "ado": "ADO", "doremi": "DoReMi"}
_DATA = results.REPOSITORY.parent / "shared/data/slimpajama_mini"

_ROOT = cli.define_path("root", None, "Folder of NAME.jsonl files; by default ../shared/data/slimpajama_mini.")
_STEPS = flags.DEFINE_integer("steps", 300, "Optimizer steps of each run.", lower_bound=1)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; each one is a run of every mixer.")
_RUNS = cli.define_path("runs", "runs/bench-mixing", "Where the run folders are.")
_OUTPUT = cli.define_path("output", f"{results.FOLDER}/mixing.json", "The result; the plot lies beside it.")


def data_folder() -> Path:
    """The folder of --root.

    Raises:
        InputError: there is none.
    """
    folder = Path(_ROOT.value or _DATA).resolve()
    if not folder.is_dir():
        raise InputError(
            f"--root: no folder {folder}; give one with commoncrawl.jsonl, c4.jsonl, github.jsonl, book.jsonl, "
            "arxiv.jsonl, wikipedia.jsonl and stackexchange.jsonl, e.g. DKYoon/SlimPajama-6B from the Hugging Face hub "
            "split by meta.redpajama_set_name"
        )
    return folder


def run_of_seed(mixer: str, seed: int, root: Path, overrides: Sequence[str]) -> RunRecords:
    """The run whose held-out loss counts, after those that it reads from; see `finished_run`."""
    if mixer != "doremi":
        return finished_run(mixer, f"{mixer}.py:local", seed, root, overrides)
    reference = f"--config.mixer.reference={run_folder('static', seed)}"
    finished_run("doremi-proxy", "doremi.py:proxy,local", seed, root, [*overrides, reference])
    weights = f"--config.mixer.proportions={run_folder('doremi-proxy', seed) / 'domain_weights.json'}"
    return finished_run("doremi", "doremi.py:target,local", seed, root, [*overrides, weights])


def run_folder(name: str, seed: int) -> Path:
    """Where a run is."""
    return (Path(_RUNS.value) / f"{name}-seed{seed}").resolve()


def finished_run(name: str, recipe: str, seed: int, root: Path, overrides: Sequence[str]) -> RunRecords:
    """Runs the training command unless its run folder is finished, and reads the folder.

    Raises:
        InputError: the run folder belongs to another command.
        TrainingError: the run was asked to stop.
        subprocess.CalledProcessError: the command failed; its own message is on stderr.
    """
    folder = run_folder(name, seed)
    settings = [
        f"--config=configs/{recipe}",
        f"--config.data.root={root}",
        f"--config.seed={seed}",
        f"--config.train_step={_STEPS.value}",
        f"--config.eval_every={max(1, _STEPS.value // 4)}",
        "--config.eval_rows=256",
        *overrides,
    ]
    made_by = folder / "command.json"
    folder.mkdir(parents=True, exist_ok=True)
    if made_by.exists() and json.loads(made_by.read_text()) != settings:
        raise InputError(f"--runs: {folder} holds a run with other settings; choose another folder")
    made_by.write_text(json.dumps(settings, indent=1) + "\n")
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "dataflex_jax.train", *settings, f"--workdir={folder}"]
        subprocess.run(command, cwd=results.REPOSITORY, check=True)
        if not (folder / "summary.json").exists():
            raise TrainingError(f"{folder}: stopped before the end; the same command goes on")
    return RunRecords.load(folder)


def final(run: RunRecords) -> dict[str, Any]:
    """A run's last evaluation on held-out rows."""
    return evaluations(run)[-1]


def losses(evaluation: dict[str, Any]) -> dict[str, float]:
    """Held-out nll [nats/token] of each domain, and over all tokens, on average over domains and of the worst one."""
    domains = {name: figures["nll"] for name, figures in evaluation["domains"].items()}
    return domains | {
        "all tokens": evaluation["overall"]["nll"],
        "average domain": float(np.mean(list(domains.values()))),
        "worst domain": max(domains.values()),
    }


def compare(runs: dict[str, list[RunRecords]]) -> dict[str, dict[str, Any]]:
    """For each row of `losses` and each mixer: mean and standard deviation over seeds; of all but static also those of
    the difference from static by seed."""
    of_runs = {mixer: [losses(final(run)) for run in of_mixer] for mixer, of_mixer in runs.items()}
    rows = {}
    for name in of_runs["static"][0]:
        values = {mixer: np.array([figures[name] for figures in of_runs[mixer]]) for mixer in MIXERS}
        values |= {f"{mixer} - static": values[mixer] - values["static"] for mixer in MIXERS if mixer != "static"}
        rows[name] = {
            column: {"mean": v.mean(), "std": v.std(ddof=1) if len(v) > 1 else None, "values": v.tolist()}
            for column, v in values.items()
        }
    return rows


def picture(runs: dict[str, list[RunRecords]]) -> Figure:
    """The mixers' sampling weights of every seed over time, and what they change by domain at the end of training."""
    styles = line_styles(list(final(runs["static"][0])["domains"]))
    dynamic = [mixer for mixer in MIXERS if mixer != "static"]
    figure, axes = new_figure(LIGHT, 4.2 * (len(dynamic) + 1), 4.2, columns=len(dynamic) + 1)
    for ax, mixer in zip(axes[:-1], dynamic, strict=True):
        _draw_mixture(ax, MIXERS[mixer], runs[mixer], styles)
    differences, markers = axes[-1], dict(zip(dynamic, "os^", strict=True))
    for offset, (mixer, marker) in zip((-0.2, 0.0, 0.2), markers.items(), strict=True):
        for place, (name, style) in enumerate(styles.items()):
            ours, static = ([final(run)["domains"][name]["nll"] for run in runs[m]] for m in (mixer, "static"))
            change = np.subtract(ours, static)
            differences.plot(np.full(len(change), place + offset), change, marker, color=style.color, markersize=5)
    differences.axhline(0, color=LIGHT.text, linewidth=0.8)
    differences.set_xticks(range(len(styles)), [""] * len(styles))
    label(differences, LIGHT, x="domain", y="held-out nll over static [nats/token], one mark a seed")
    mixers = [(Line2D([], [], color=LIGHT.text, marker=m, linestyle=""), MIXERS[name]) for name, m in markers.items()]
    legend(differences, LIGHT, mixers + [(Line2D([], [], color=s.color, linewidth=2), n) for n, s in styles.items()])
    return figure


def _draw_mixture(ax: Axes, title: str, runs: Sequence[RunRecords], styles: dict[str, LineStyle]) -> None:
    for run in runs:
        steps = [record["step"] for record in run.policy]
        for name, style in styles.items():
            weights = [record["observed"]["drawn_with"][name] for record in run.policy]
            ax.plot(steps, weights, color=style.color, linewidth=0.9, alpha=0.8)
    ax.set_ylim(bottom=0)
    label(ax, LIGHT, x="step", y=f"{title}: proportion drawn with, one line a seed")


def setting(run: RunRecords) -> dict[str, Any]:
    """What all mixers share."""
    config = run.config["config"]
    return {
        "steps": config["train_step"],
        "tokens": run.summary["tokens_seen"],
        "data": {name: config["data"][name] for name in ("tokenizer", "seq_len", "batch_size")},
        "model": config["model"],
        "learning_rate": config["optim"]["learning_rate"],
        "schedule": {name: config[name] for name in ("warmup_step", "update_step")},
        "held_out_tokens": final(run)["overall"]["tokens"],
    }


def main(argv: list[str]) -> None:
    root, seeds = data_folder(), [int(seed) for seed in _SEEDS.value]
    # Seed by seed, so that a study stopped early has whole comparisons.
    of_seeds = [{mixer: run_of_seed(mixer, seed, root, argv[1:]) for mixer in MIXERS} for seed in seeds]
    runs = {mixer: [of_seed[mixer] for of_seed in of_seeds] for mixer in MIXERS}
    rows = compare(runs)
    example = runs["odm"][0]
    result = {
        **results.describe(example.config),
        "setting": setting(example),
        "seeds": seeds,
        "held_out_nll": rows,
        "domain_epochs": {
            mixer: [run.summary["domain_epochs"] for run in of_mixer] for mixer, of_mixer in runs.items()
        },
        "tokens_per_second": {
            mixer: [run.summary["tokens_per_second"] for run in of_mixer] for mixer, of_mixer in runs.items()
        },
    }
    results.write(_OUTPUT.value, result)
    picture(runs).savefig(Path(_OUTPUT.value).with_suffix(".png"), facecolor=LIGHT.background)
    print(results.comparison(rows))


if __name__ == "__main__":
    cli.run(main)
