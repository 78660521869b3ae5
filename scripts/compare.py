"""Recipes over seeds in one command, and the report that compares them.

    python scripts/compare.py --recipes=configs/odm.py:local,configs/static.py:local --seeds=3 --output=runs/compare
        [--mapped] [--config.field=value ...]

Every run is the real command, `python -m dataflex_jax.train --config=RECIPE --config.seed=SEED`, with the fields that
are given for all; its folder is OUTPUT/RECIPE/seedN, and what it prints is in seedN.log beside it. Runs come one after
another, seed by seed. One that fails is named and the others go on. The same command again skips what is finished and
goes on with what was stopped. At the end: OUTPUT/report.html, and OUTPUT/report_files/ with its figures and tables.

With --mapped all seeds of a recipe are trained as one program (scripts/mapped_seeds.py), which small models on few
devices are quicker in, without selectors and orders. Then a seed's folder has its held-out losses at the end only.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from tqdm import tqdm

from dataflex_jax import cli, preemption
from dataflex_jax.errors import InputError, TrainingError
from dataflex_jax.files import replace_json
from dataflex_jax.foreign import read_json
from dataflex_jax.reporting.page import write_report

TRAIN = (sys.executable, "-m", "dataflex_jax.train")
MAPPED = (sys.executable, str(Path(__file__).with_name("mapped_seeds.py")))
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LINES = 30.0
_BAR = "{percentage:3.0f}%|{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}{postfix}]"


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("recipes", None, "Recipes, each with its variant, with commas between.")
    flags.DEFINE_string("seeds", "3", "How many seeds, from 0 on; or which, as in 0,3,5.")
    cli.define_path("output", "runs/compare", "The folder of the runs and the report.")
    flags.DEFINE_bool("mapped", False, "Train all seeds of a recipe as one program.")


class Planned(NamedTuple):
    """A run to be made, or all seeds of one as one program.

    Attributes:
        name: RECIPE/seedN, or RECIPE/mapped.
        folder: the run folder; of several seeds, the one beside theirs.
        settings: the arguments that say what it is.
        seeds: those that are trained as one program; none: it is a run alone.
    """

    name: str
    folder: Path
    settings: list[str]
    seeds: Sequence[int] = ()

    @property
    def results(self) -> list[Path]:
        """The run folders that it leaves."""
        return [self.folder.with_name(f"seed{seed}") for seed in self.seeds] or [self.folder]

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        """Whether its results are there."""
        return (self.folder / "summary.json").exists()


def planned(
    recipes: Sequence[str], seeds: Sequence[int], output: Path, overrides: Sequence[str], *, mapped: bool = False
) -> list[Planned]:
    """The runs in the order in which they are made; `mapped`: a program for each recipe.

    Raises:
        InputError: two recipes of one name, or a run folder that holds something else.
    """
    if given := next((field for field in overrides if field.startswith("--config.seed=")), None):
        raise InputError(f"{given}: the seeds are those of --seeds")
    names = [_name(recipe) for recipe in recipes]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--recipes: {doubled!r} is there twice; each recipe must have another name or variant")
    if mapped:
        of_all = ",".join(map(str, seeds)) + ","
        runs = [
            Planned(
                f"{name}/mapped",
                output / name / "mapped",
                [f"--config={recipe}", f"--seeds={of_all}", *overrides],
                seeds,
            )
            for name, recipe in zip(names, recipes, strict=True)
        ]
        return _checked(runs, output)
    # Seed by seed, so that a comparison stopped early has whole seeds.
    runs = [
        Planned(
            f"{name}/seed{seed}",
            output / name / f"seed{seed}",
            [f"--config={recipe}", f"--config.seed={seed}", *overrides],
        )
        for seed in seeds
        for name, recipe in zip(names, recipes, strict=True)
    ]
    return _checked(runs, output)


def _checked(runs: list[Planned], output: Path) -> list[Planned]:
    for run in runs:
        others = [folder for folder in run.results if folder.exists() and not run.folder.exists()]
        if others or (run.folder.exists() and run.settings != _made_by(run)):
            reason = "was not made by this command with these settings; choose another folder"
            raise InputError(f"--output={output}: {others[0] if others else run.folder} {reason}")
    return runs


def list_of_recipes(text: str | None) -> list[str]:
    """The recipes of --recipes; a variant may have commas too.

    Raises:
        InputError: there is none, or a part is no recipe.
    """
    recipes: list[str] = []
    for part in filter(None, (text or "").split(",")):
        if part.partition(":")[0].endswith(".py"):
            recipes.append(part)
        elif recipes:
            recipes[-1] += f",{part}"
        else:
            raise InputError(f"--recipes={text}: {part!r} is no recipe; files are expected, as in configs/odm.py:local")
    if not recipes:
        raise InputError("--recipes is missing, e.g. --recipes=configs/odm.py:local,configs/static.py:local")
    return recipes


def list_of_seeds(text: str) -> list[int]:
    """The seeds of --seeds.

    Raises:
        InputError: not a number of seeds, or numbers that differ.
    """
    if not re.fullmatch(r"\d+(,\d+)*,?", text) or text == "0":
        raise InputError(f"--seeds={text}: how many, as in 3, or which, as in 0,3,5, is expected")
    seeds = [int(seed) for seed in text.split(",") if seed] if "," in text else list(range(int(text)))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds={text}: a seed is there twice")
    return seeds


def train(run: Planned, show: Callable[[float, str], None], requested: Callable[[int], bool]) -> str | None:
    """Makes a run, or goes on with it.

    Args:
        run: what to make.
        show: is told what part of it is done, and at which step it is.
        requested: whether to save and stop.

    Returns:
        Why it failed, in a line; None: it is finished, or was asked to stop.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    replace_json(run.folder / "command.json", run.settings, indent=1)
    with open(run.log, "a", encoding="utf-8") as log:
        begin = log.tell()
        # In a session of its own, so that Ctrl-C reaches it once, by way of this process.
        process = subprocess.Popen(
            [*(MAPPED if run.seeds else TRAIN), *run.settings, f"--workdir={run.folder}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    told = False
    while process.poll() is None:
        if not told and (told := requested(0)):
            process.terminate()
        show(*_progress(run))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if told or (process.returncode == 0 and run.is_finished):
        return None
    with open(run.log, encoding="utf-8", errors="replace") as log:
        log.seek(begin)
        last = next((line.strip() for line in reversed(log.readlines()) if line.strip()), "it printed nothing")
    return f"exit code {process.returncode}, {last.removeprefix('error: ')} ({run.log})"


class Bar:
    """One bar over all runs, with the time left; where stderr is no terminal, a line now and then.

    Args:
        total: runs.
        done: those that were finished before.
    """

    def __init__(self, total: int, done: int):
        self._terminal, self._last_line = sys.stderr.isatty(), 0.0
        # The mean rate, as a run's own changes from phase to phase.
        self._bar = tqdm(total=total, initial=done, bar_format=_BAR, smoothing=0, disable=not self._terminal)
        self._total, self._before, self._begun = total, done, time.monotonic()

    def show(self, done: float, note: str) -> None:
        """Shows how many runs are done, a part of one among them, and what is at work."""
        if self._terminal:
            self._bar.n = done
            self._bar.set_postfix_str(note)
        elif (now := time.monotonic()) - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            elapsed, how = now - self._begun, {"bar_format": _BAR.replace("|{bar}|", ""), "postfix": note}
            line = tqdm.format_meter(done, self._total, elapsed, initial=self._before, **how)
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._bar.close()


def train_all(runs: Sequence[Planned], requested: Callable[[int], bool]) -> dict[str, str]:
    """Makes what is not finished; returns why runs failed, by name. Ends early where it is asked to stop."""
    failed: dict[str, str] = {}
    waiting = [run for run in runs if not run.is_finished]
    bar = Bar(len(runs), len(runs) - len(waiting))
    for number, run in enumerate(waiting, start=len(runs) - len(waiting)):
        fault = train(run, lambda part, at, n=number, name=run.name: bar.show(n + part, f"{name} {at}"), requested)
        if fault is not None:
            failed[run.name] = fault
            bar.say(f"{run.name} failed: {fault}")
        if requested(0):
            break
    bar.close()
    return failed


def _name(recipe: str) -> str:
    path, _, variant = recipe.partition(":")
    return re.sub(r"[^\w.-]+", "-", f"{Path(path).stem} {variant}".strip())


def _made_by(run: Planned) -> object:
    path = run.folder / "command.json"
    return read_json(path) if path.exists() else None


def _progress(run: Planned) -> tuple[float, str]:
    """(the part of a run that is done, where it is in words), by its own files."""
    config, metrics = run.folder / "config.json", run.folder / "metrics.jsonl"
    if not config.exists() or not metrics.exists():
        return 0.0, "starts"
    steps = read_json(config)["config"]["train_step"]
    with open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - (1 << 16)))
        found = re.findall(rb'^\{"step": (\d+),.*\n', file.read(), re.MULTILINE)
    step = int(found[-1]) if found else 0
    # Of a run of some epochs the steps are not known from outside.
    return (min(step / steps, 1.0), f"step {step} of {steps}") if steps else (0.0, f"step {step}")


def main(argv: list[str]) -> None:
    # The runs need the accelerators, not this process.
    jax.config.update("jax_platforms", "cpu")
    options = flags.FLAGS
    output = Path(options.output)
    recipes, seeds = list_of_recipes(options.recipes), list_of_seeds(options.seeds)
    runs = planned(recipes, seeds, output, argv[1:], mapped=options.mapped)
    with preemption.watch() as requested:
        failed = train_all(runs, requested)
        if requested(0):
            print("Stopped on request; the same command goes on.")
            return
    folders = dict.fromkeys(run.folder.parent for run in runs)
    finished = [
        result
        for folder in folders
        for run in runs
        if run.folder.parent == folder and run.is_finished
        for result in run.results
    ]
    if finished:
        page = write_report(finished, output / "report.html", files=output / "report_files")
        print(f"Report:  {page}")
    if failed:
        first = next(iter(failed.values()))
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed, {', '.join(failed)}; the first with {first}")


def with_overrides_last(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of the runs, --config.field=value, after "--"."""
    of_runs = [argument for argument in arguments if argument.startswith("--config.")]
    return [*(argument for argument in arguments if argument not in (*of_runs, "--")), "--", *of_runs]


if __name__ == "__main__":
    sys.argv[1:] = with_overrides_last(sys.argv[1:])
    cli.run(main, define_flags)
