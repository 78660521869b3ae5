"""The pictures of several small plots: held-out nll by domain, the metrics of other evaluators, and any by group.

Every figure is a function of `RunRecords`, returns None where they have nothing to draw, and touches no global state.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dataflex_jax.reporting.bands import Groups, band
from dataflex_jax.reporting.evaluations import evaluations, shown_metrics
from dataflex_jax.reporting.plot_style import (
    LIGHT,
    Band,
    Chart,
    Theme,
    draw_band,
    label,
    legend,
    line_styles,
    new_figure,
)
from dataflex_jax.reporting.run_folder import series

_FEW = 50

Plot = tuple[str, Mapping[str, Band]]


def small_plots(
    theme: Theme, plots: Sequence[Plot], groups: Sequence[str], fewest: int = 1
) -> tuple[Chart, list[Axes], list[Plot]] | None:
    """One small plot a title, one line with its band a group, and a legend where there are several.

    Args:
        theme: of the picture.
        plots: (title, {group: curve}).
        groups: all of them, for their colours.
        fewest: points that the longest curve of a plot must have; other plots are left out.

    Returns:
        The figure, its axes and the plots in them; None without any.
    """
    plots = [plot for plot in plots if max((len(curve.steps) for curve in plot[1].values()), default=0) >= fewest]
    if not plots:
        return None
    styles = line_styles(groups)
    columns = min(4, len(plots))
    rows = -(-len(plots) // columns)
    figure, axes = new_figure(theme, 2.6 * columns + 1.0, 2.1 * rows + 0.7, rows, columns)
    for ax, (title, curves) in zip(axes, plots, strict=False):
        for name, curve in curves.items():
            dots = {"marker": "o", "markersize": 3} if len(curve.steps) <= _FEW else {}
            draw_band(ax, name, curve, color=styles[name].color, linewidth=1.3, **dots)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        label(ax, theme, title=title)
    for ax in axes[len(plots) :]:
        ax.set_visible(False)
    figure.supxlabel("step", color=theme.text, fontsize=9.5)
    if len(groups) > 1:
        entries = [(Line2D([], [], color=style.color, linewidth=1.5), name) for name, style in styles.items()]
        legend(figure, theme, entries, loc="outside upper left", ncols=min(4, len(entries)), frameon=False)
    return figure, axes[: len(plots)], plots


def _leave_out_steep_start(ax: Axes, curves: Iterable[Band]) -> None:
    """Fits the y axis to all but the first quarter of each curve: what is compared is where the runs end."""
    ends = [values for _, _, low, high in curves for values in (low, high)]
    late = np.concatenate([values[len(values) // 4 :] for values in ends])
    margin = 0.08 * (late.max() - late.min())
    if margin > 0:
        ax.set_ylim(late.min() - margin, late.max() + margin)


def held_out_by_domain_figure(groups: Groups, domains: Sequence[str], theme: Theme = LIGHT) -> Chart | None:
    """One small plot a domain: its held-out nll over steps, one line a group."""
    plots = [
        (
            domain,
            {
                name: band([series(evaluations(run), "domains", domain, "nll") for run in runs])
                for name, runs in groups.items()
            },
        )
        for domain in domains
    ]
    drawn = small_plots(theme, plots, list(groups))
    if drawn is None:
        return None
    figure, axes, plots = drawn
    for ax, (_, curves) in zip(axes, plots, strict=True):
        _leave_out_steep_start(ax, curves.values())
    figure.supylabel("held-out nll [nats/token]", color=theme.text, fontsize=9.5)
    return figure


def evaluator_figure(groups: Groups, split: str, theme: Theme = LIGHT) -> Chart | None:
    """One small plot a metric that an evaluator gave overall, at two steps of a run or more; one line a group."""
    records = {name: [evaluations(run, split) for run in runs] for name, runs in groups.items()}
    metrics = shown_metrics(record.get("overall") for runs in records.values() for lines in runs for record in lines)
    plots = [
        (metric.label, {name: band([series(r, "overall", metric.key) for r in runs]) for name, runs in records.items()})
        for metric in metrics
    ]
    drawn = small_plots(theme, plots, list(groups), fewest=2)
    return None if drawn is None else drawn[0]
