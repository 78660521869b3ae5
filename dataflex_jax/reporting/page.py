"""One self-contained HTML page that shows one run, or compares several."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.plot_style import DARK, LIGHT, Theme, line_styles
from dataflex_jax.reporting.plots import domain_names, held_out_by_domain_figure, loss_figure, run_figures
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.trackers import flatten

_METRICS = (
    ("nll", "nll [nats/token]", "{:.4f}"),
    ("perplexity", "perplexity", "{:#.4g}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
)
_MISSING = "—"
_TITLES = {
    "loss": "Loss",
    "domain_losses": "Loss by domain",
    "mixture": "Mixture",
    "loss_weights": "Domain weights in the loss",
    "excess": "Excess loss over the reference by domain",
    "domain_epochs": "Epochs by domain",
    "example_weights": "Example weights",
    "selector_scores": "Selector scores",
    "optimizer": "Learning rate and gradient norm",
    "throughput": "Throughput",
}
# What a reader asks of a run first, as far as its configuration has it.
_HIGHLIGHTS = (
    "mixer.name",
    "selector.name",
    "order.name",
    "weighter.name",
    "model.name_or_path",
    "model.architecture",
    "model.hidden_size",
    "model.num_hidden_layers",
    "lora.rank",
    "data.source",
    "data.seq_len",
    "data.batch_size",
    "train_step",
    "optim.learning_rate",
    "optim.schedule",
    "seed",
)


@dataclass(frozen=True)
class Cell:
    """One table cell; `best` marks the lowest of a row of losses."""

    text: str
    best: bool = False


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
        overview=_overview(runs),
        differences=_differences(runs),
        highlights=_highlights(runs),
        held_out=_held_out_tables(runs),
        held_out_note=_held_out_note(runs),
        sections=_compared_pictures(runs) + _run_pictures(runs),
        configs=[(name, {k: _text(v) for k, v in _config(run).items()}) for name, run in runs.items()],
        summary=_summary_table(runs),
    )
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
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


def _text(value: Any, number: str = "{:.6g}") -> str:
    if value is None:
        return _MISSING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number.format(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or _MISSING
    return str(value)


def _overview(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Cell]]]:
    """How far each run came and how fast it was."""

    def last(field: str) -> Callable[[RunRecords], Any]:
        return lambda r: next((m[field] for m in reversed(r.metrics) if m.get(field) is not None), None)

    def percent(r: RunRecords) -> str | None:
        mfu = last("mfu")(r)
        return None if mfu is None else f"{100 * mfu:.1f} %"

    rows: tuple[tuple[str, Callable[[RunRecords], Any], str], ...] = (
        ("last step", last("step"), ""),
        ("tokens seen", last("tokens_seen"), ""),
        ("last training loss", last("loss"), "{:.4f}"),
        ("tokens/s", last("tokens_per_second"), "{:,.0f}"),
        ("MFU", percent, ""),
    )
    table = [(label, [Cell(_text(value(r), number)) for r in runs.values()]) for label, value, number in rows]
    return [(label, cells) for label, cells in table if any(cell.text != _MISSING for cell in cells)]


def _config(run: RunRecords) -> dict[str, Any]:
    """The resolved configuration, flat, with dots; versions and device as they stand in config.json."""
    flat = flatten(run.config)
    return {name.removeprefix("config/").replace("/", "."): value for name, value in flat.items()}


def _config_rows(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    return [(name, [Cell(_text(config.get(name))) for config in configs]) for name in names]


def _differences(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Cell]]]:
    configs = [_config(run) for run in runs.values()]
    names = list(dict.fromkeys(name for config in configs for name in config))
    return _config_rows(configs, [n for n in names if any(c.get(n) != configs[0].get(n) for c in configs[1:])])


def _highlights(runs: Mapping[str, RunRecords]) -> list[tuple[str, str]]:
    """The highlights that all runs share; those that differ stand in the table of differences."""
    configs = [_config(run) for run in runs.values()]
    shared = [n for n in _HIGHLIGHTS if all(c.get(n) == configs[0].get(n) for c in configs)]
    return [(name, _text(configs[0][name])) for name in shared if configs[0].get(name) is not None]


@dataclass(frozen=True)
class HeldOutTable:
    """The last evaluation of every run on one split: rows of domains, a group of columns a metric."""

    split: str
    groups: list[str]
    steps: list[str]
    rows: list[tuple[str, list[Cell]]]


def _held_out_tables(runs: Mapping[str, RunRecords]) -> list[HeldOutTable]:
    splits = dict.fromkeys(record.get("split") for run in runs.values() for record in run.evals)
    return [_held_out_table(runs, split) for split in splits]


def _held_out_table(runs: Mapping[str, RunRecords], split: str) -> HeldOutTable:
    last = [next((e for e in reversed(run.evals) if e.get("split") == split), {}) for run in runs.values()]
    per_domain = [record.get("domains") or {} for record in last]
    domains = list(dict.fromkeys(name for scores in per_domain for name in scores))
    # An overall loss over other domains is another quantity: no run is the best of it.
    same_domains = all(set(scores) == set(domains) for scores in per_domain if scores)

    def row(scores: Sequence[Mapping[str, float]], compare: bool = True) -> list[Cell]:
        return [cell for key, _, number in _METRICS for cell in _cells([s.get(key) for s in scores], number, compare)]

    rows = [(name, row([scores.get(name) or {} for scores in per_domain])) for name in domains]
    rows.append(("overall", row([record.get("overall") or {} for record in last], same_domains)))
    return HeldOutTable(
        split=str(split),
        groups=[label for _, label, _ in _METRICS],
        steps=[_text(record.get("step")) for record in last],
        rows=rows,
    )


def _cells(values: Sequence[float | None], number: str, compare: bool) -> list[Cell]:
    """The values of one row; with `compare` the lowest of several is the best, and those that print alike share it."""
    texts = [_text(value, number) for value in values]
    known = [value for value in values if value is not None]
    best = _text(min(known), number) if compare and len(known) > 1 else None
    return [Cell(text, best=text == best) for text in texts]


def _held_out_note(runs: Mapping[str, RunRecords]) -> str:
    tokenizers = {_text(_config(run).get("data.tokenizer")) for run in runs.values()}
    if len(tokenizers) > 1:
        return "The runs have different tokenizers: compare bits/byte, not nll and perplexity, which are per token."
    return ""


def _summary_table(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Cell]]]:
    summaries = [flatten(run.summary) for run in runs.values()]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    return [(name, [Cell(_text(summary.get(name))) for summary in summaries]) for name in names]


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
