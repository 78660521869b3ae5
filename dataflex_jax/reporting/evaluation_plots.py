"""The pictures of evaluations: held-out nll by domain, and the metrics of other evaluators.

Every figure is a function of `RunRecords`, returns None where they have nothing to draw, and touches no global state.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dataflex_jax.reporting.evaluations import evaluations, shown_metrics
from dataflex_jax.reporting.plot_style import LIGHT, Theme, label, legend, line_styles, new_figure
from dataflex_jax.reporting.run_folder import RunRecords, series

_Curve = tuple[np.ndarray, np.ndarray]
_Plot = tuple[str, dict[str, _Curve]]


def _small_plots(theme: Theme, plots: Sequence[_Plot], runs: Sequence[str]) -> tuple[Figure, list[Axes]] | None:
    """One small plot a title, one line a run, with a legend where there are several; None without plots."""
    if not plots:
        return None
    styles = line_styles(runs)
    columns = min(4, len(plots))
    rows = -(-len(plots) // columns)
    figure, axes = new_figure(theme, 2.6 * columns + 1.0, 2.1 * rows + 0.7, rows, columns)
    for ax, (title, curves) in zip(axes, plots, strict=False):
        for name, (steps, values) in curves.items():
            ax.plot(steps, values, color=styles[name].color, linewidth=1.3, marker="o", markersize=3)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        label(ax, theme, title=title)
    for ax in axes[len(plots) :]:
        ax.set_visible(False)
    figure.supxlabel("step", color=theme.text, fontsize=9.5)
    if len(runs) > 1:
        look = {"linewidth": 1.5, "marker": "o", "markersize": 3}
        entries = [(Line2D([], [], color=style.color, **look), name) for name, style in styles.items()]
        legend(figure, theme, entries, loc="outside upper left", ncols=min(4, len(entries)), frameon=False)
    return figure, axes[: len(plots)]


def _leave_out_steep_start(ax: Axes, curves: Iterable[_Curve]) -> None:
    """Fits the y axis to all but the first quarter of each curve: what is compared is where the runs end."""
    late = np.concatenate([values[len(values) // 4 :] for _, values in curves])
    margin = 0.08 * (late.max() - late.min())
    if margin > 0:
        ax.set_ylim(late.min() - margin, late.max() + margin)


def held_out_by_domain_figure(
    runs: Mapping[str, RunRecords], domains: Sequence[str], theme: Theme = LIGHT
) -> Figure | None:
    """One small plot a domain: its held-out nll over steps, one line a run."""
    plots = [
        (domain, {name: series(evaluations(run), "domains", domain, "nll") for name, run in runs.items()})
        for domain in domains
    ]
    plots = [(domain, curves) for domain, curves in plots if any(len(steps) for steps, _ in curves.values())]
    drawn = _small_plots(theme, plots, list(runs))
    if drawn is None:
        return None
    figure, axes = drawn
    for ax, (_, curves) in zip(axes, plots, strict=True):
        _leave_out_steep_start(ax, curves.values())
    figure.supylabel("held-out nll [nats/token]", color=theme.text, fontsize=9.5)
    return figure


def evaluator_figure(runs: Mapping[str, RunRecords], split: str, theme: Theme = LIGHT) -> Figure | None:
    """One small plot a metric that an evaluator gave overall, at two steps of a run or more; one line a run."""
    records = {name: evaluations(run, split) for name, run in runs.items()}
    metrics = shown_metrics(record.get("overall") for of_run in records.values() for record in of_run)
    plots = [
        (metric.label, {name: series(of_run, "overall", metric.key) for name, of_run in records.items()})
        for metric in metrics
    ]
    plots = [(title, curves) for title, curves in plots if any(len(steps) > 1 for steps, _ in curves.values())]
    drawn = _small_plots(theme, plots, list(runs))
    return None if drawn is None else drawn[0]
