"""One self-contained HTML page that shows one run, or compares several."""

import base64
import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from dataflex_jax.errors import InputError, is_disk_full
from dataflex_jax.files import replace_file
from dataflex_jax.reporting.evaluation_plots import evaluator_figure, held_out_by_domain_figure
from dataflex_jax.reporting.evaluations import HELD_OUT, splits
from dataflex_jax.reporting.plot_style import DARK, LIGHT, Theme, line_styles
from dataflex_jax.reporting.plots import domain_names, loss_figure, run_figures
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.tables import (
    config_tables,
    differences,
    evaluation_tables,
    highlights,
    overview,
    summary_table,
)

_TITLES = {
    "loss": "Loss",
    "domain_losses": "Loss by domain",
    "mixture": "Mixture",
    "loss_weights": "Domain weights in the loss",
    "excess": "Excess loss over the reference by domain",
    "domain_epochs": "Epochs by domain",
    "example_weights": "Example weights",
    "selection": "Selections by domain, coverage and overlap",
    "selector_scores": "Selector scores",
    "optimizer": "Learning rate and gradient norm",
    "throughput": "Throughput",
}


@dataclass(frozen=True)
class Picture:
    """A figure in both themes, as data URLs, and the width [CSS pixels] at which its text has the page's size."""

    title: str
    width: int
    light: str
    dark: str


def write_report(run_folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Writes the page and returns its path; the page needs no other file and no network.

    Raises:
        InputError: no folder given, one is not a run folder, a file in one is malformed, or the page cannot be written.
    """
    if not run_folders:
        raise InputError(
            "no run given; usage: python -m dataflex_jax.report RUN_DIR [RUN_DIR ...] --output=report.html"
        )
    runs = _named([RunRecords.load(folder) for folder in run_folders])
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("dataflex_jax.reporting", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.jinja")
    page = template.render(
        title=" · ".join(runs),
        names=list(runs),
        folders=[str(run.folder) for name, run in runs.items() if str(run.folder) != name],
        overview=overview(runs),
        differences=differences(runs),
        highlights=highlights(runs),
        evaluations=evaluation_tables(runs),
        sections=_compared_pictures(runs) + _evaluator_pictures(runs) + _run_pictures(runs),
        configs=config_tables(runs),
        summary=summary_table(runs),
    )
    output = Path(output)
    try:
        replace_file(output, page.encode())
    except OSError as error:
        if is_disk_full(error):
            raise
        raise InputError(f"--output={output}: cannot be written ({error.strerror}); a file path is expected") from error
    return output


def _named(runs: Sequence[RunRecords]) -> dict[str, RunRecords]:
    """The runs by the shortest end of their paths that tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise InputError("the same run folder is given twice; each RUN_DIR must be another run")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return {"/".join(p[-depth:]): run for p, run in zip(parts, runs, strict=True)}


def _compared_pictures(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Picture]]]:
    """The figures that hold all runs at once: [(figure title, its only picture)]."""
    if len(runs) < 2:
        return []
    domains = _all_domains(runs)
    pictures = (
        ("Loss", _picture("", lambda theme: loss_figure(runs, theme))),
        ("Held-out nll by domain", _picture("", lambda theme: held_out_by_domain_figure(runs, domains, theme))),
    )
    return [(title, [picture]) for title, picture in pictures if picture is not None]


def _evaluator_pictures(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Picture]]]:
    """What evaluators other than the held-out loss found, all runs at once: [(evaluator, its only picture)]."""
    names = [split for split in splits(runs.values()) if split != HELD_OUT]
    pictures = {name: _picture("", functools.partial(evaluator_figure, runs, name)) for name in names}
    return [(f"{name} over steps", [picture]) for name, picture in pictures.items() if picture is not None]


def _run_pictures(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Picture]]]:
    """Figure by figure, the runs beneath one another: [(figure title, a picture a run)]."""
    styles = line_styles(_all_domains(runs))
    figures = {name: run_figures(run, styles) for name, run in runs.items()}
    sections = []
    for key, title in _TITLES.items():
        if key == "loss" and len(runs) > 1:
            continue
        pictures = [_picture(name if len(runs) > 1 else "", of_run[key]) for name, of_run in figures.items()]
        drawn = [picture for picture in pictures if picture is not None]
        if drawn:
            sections.append((title, drawn))
    return sections


def _all_domains(runs: Mapping[str, RunRecords]) -> list[str]:
    return list(dict.fromkeys(domain for run in runs.values() for domain in domain_names(run)))


def _picture(title: str, draw: Callable[[Theme], Figure | None]) -> Picture | None:
    light = draw(LIGHT)
    if light is None:
        return None
    return Picture(title, round(100 * light.get_figwidth()), _data_url(light), _data_url(draw(DARK)))


def _data_url(figure: Figure) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", facecolor=figure.get_facecolor())
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
