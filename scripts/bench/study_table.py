"""The study's tables: each row beside its baseline, seed by seed, with intervals; and their pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, ScalarFormatter
from scipy.special import stdtr
from study_rows import Row
from study_runs import Losses

from dataflex_jax.reporting.intervals import difference, spread
from dataflex_jax.reporting.plot_style import LIGHT, label, legend, line_styles, new_figure

MEASURES = {"average": "average over the domains", "worst": "worst domain"}
_LEVEL = 0.05


def table(found: Mapping[str, Losses], rows: Mapping[str, Row], baseline: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Of each row: average and worst-domain loss, both beside the baseline's, wins and losses, and what it cost.

    Args:
        found: of the rows that are done; the baseline is one.
        rows: all rows.
        baseline: whom the others are compared with.
        seeds: of the models.
    """
    lines = {}
    for name, losses in found.items():
        line: dict[str, Any] = {"label": rows[name].label, "beside": rows[name].beside}
        theirs = _measures(found[baseline])
        for measure, values in _measures(losses).items():
            mean, std = spread(values)
            line[measure] = {"mean": mean, "std": std, "values": values.tolist()}
            if name != baseline:
                line[measure]["against"] = _against(values, theirs[measure], seeds)
        line["domains"] = dict(zip(losses.groups, losses.values.mean(axis=0).tolist(), strict=True))
        line["values"] = losses.values.tolist()
        line["trained"], line["cpu_seconds"] = losses.trained, losses.cpu_seconds
        lines[name] = line
    for measure in MEASURES:
        _mark_clear([line[measure]["against"] for line in lines.values() if "against" in line[measure]])
    return lines


def _measures(losses: Losses) -> dict[str, Float64[np.ndarray, " n"]]:
    return {"average": losses.values.mean(axis=1), "worst": losses.values.max(axis=1)}


def _against(ours: np.ndarray, theirs: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    change = difference(dict(zip(seeds, ours, strict=True)), dict(zip(seeds, theirs, strict=True)))
    differences = ours - theirs
    error = differences.std(ddof=1) / math.sqrt(len(seeds))
    p = 2 * float(stdtr(len(seeds) - 1, -abs(differences.mean()) / error)) if error > 0 else 1.0
    wins, losses = int((differences < 0).sum()), int((differences > 0).sum())
    return change._asdict() | {"sign": change.sign, "p": p, "wins": wins, "losses": losses}


def _mark_clear(comparisons: Sequence[dict[str, Any]]) -> None:
    """Says of each comparison whether it stands among so many of them (Holm's correction, 5 %)."""
    standing = True
    for rank, each in enumerate(sorted(comparisons, key=lambda one: one["p"])):
        standing = standing and each["p"] * (len(comparisons) - rank) <= _LEVEL
        each["clear"] = standing


def picture(lines: Mapping[str, Any], baseline: str) -> Figure:
    """How far each row is from the baseline: on average, in the worst domain, and domain by domain."""
    others = {name: line for name, line in lines.items() if name != baseline}
    figure, axes = new_figure(LIGHT, 13.0, max(3.2, 0.38 * (len(others) + 3)), columns=len(MEASURES) + 1)
    for ax, (measure, words) in zip(axes, MEASURES.items(), strict=False):
        for place, line in enumerate(others.values()):
            against = line[measure]["against"]
            color = {-1: "#2ca02c", 0: LIGHT.text, 1: "#d62728"}[against["sign"]]
            changes = np.subtract(line[measure]["values"], lines[baseline][measure]["values"])
            ax.plot(changes, np.full(len(changes), place + 0.2), ".", color=LIGHT.text, markersize=3, alpha=0.5)
            ax.plot([against["low"], against["high"]], [place, place], color=color, linewidth=1.8)
            ax.plot([against["mean"]], [place], "o", color=color, markersize=5)
        _rows(ax, others, words)
    _domains(axes[-1], others, lines[baseline]["domains"])
    return figure


def _domains(ax: Axes, others: Mapping[str, Any], of_baseline: Mapping[str, float]) -> None:
    styles = line_styles(list(of_baseline))
    for place, line in enumerate(others.values()):
        for name, style in styles.items():
            change = line["domains"][name] - of_baseline[name]
            ax.plot([change], [place], "o", color=style.color, markersize=5, alpha=0.8)
    _rows(ax, others, "each domain, the mean over seeds")
    dots = [(Line2D([], [], marker="o", linestyle="", color=style.color), name) for name, style in styles.items()]
    legend(ax, LIGHT, dots)


def _rows(ax: Axes, others: Mapping[str, Any], title: str) -> None:
    ax.axvline(0.0, color=LIGHT.text, linewidth=0.8, zorder=0)
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.yaxis.set_major_locator(FixedLocator(range(len(others))))
    ax.set_yticklabels([line["label"] for line in others.values()] if ax.get_subplotspec().is_first_col() else [])
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    label(ax, LIGHT, x="held-out nll over the baseline's [nats/token]", title=title)
