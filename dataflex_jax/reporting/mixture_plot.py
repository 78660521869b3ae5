"""The picture of a swarm: what its law predicts, the mixture that it proposes, and which domains matter."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from dataflex_jax.reporting.plot_style import LIGHT, LineStyle, Theme, label, legend, line_styles, new_figure

_MOST_METRICS = 10  # with colours of their own


class Predictions(NamedTuple):
    """Of a metric.

    Attributes:
        measured: of each run.
        predicted: of each run, by a law that was fitted without it.
        r2: of these.
        sensitivity: of each domain.
    """

    measured: Float64[np.ndarray, " S"]
    predicted: Float64[np.ndarray, " S"]
    r2: float
    sensitivity: Float64[np.ndarray, " K"]


def mixture_figure(
    metrics: Mapping[str, Predictions],
    domains: Sequence[str],
    mixtures: Mapping[str, Float64[np.ndarray, " K"]],
    theme: Theme = LIGHT,
) -> Figure:
    """Left what was predicted against what was measured; the mixtures side by side; right each domain's sensitivity.

    Args:
        metrics: what the law says of each, by name.
        domains: names.
        mixtures: weights of the domains, by name.
        theme: the colours.
    """
    figure, (left, middle, right) = new_figure(theme, 12.6, max(3.6, 0.3 * len(domains) + 1.6), 1, 3)
    few = len(metrics) <= _MOST_METRICS
    styles = line_styles(list(metrics) if few else ["all"])
    styles = styles if few else dict.fromkeys(metrics, styles["all"])
    _predictions(left, metrics, styles, theme)
    _mixtures(middle, domains, mixtures, theme)
    _sensitivities(right, domains, metrics, styles, theme)
    if few:
        dots = [
            (Line2D([], [], marker="o", linestyle="", color=styles[name].color), f"{name}, R² {each.r2:.2f}")
            for name, each in metrics.items()
        ]
        legend(figure, theme, dots, loc="outside lower center", ncols=min(4, len(metrics)), frameon=False)
    return figure


def _predictions(ax: Axes, metrics: Mapping[str, Predictions], styles: Mapping[str, LineStyle], theme: Theme) -> None:
    for name, each in metrics.items():
        ax.plot(each.measured, each.predicted, "o", color=styles[name].color, markersize=3, alpha=0.7)
    ends = [function([function(each.measured) for each in metrics.values()]) for function in (np.min, np.max)]
    ax.plot(ends, ends, color=theme.text, linewidth=0.8, zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6))
        axis.set_major_formatter(ScalarFormatter())
    label(ax, theme, x="measured", y="predicted by the other folds", title="runs")


def _mixtures(
    ax: Axes, domains: Sequence[str], mixtures: Mapping[str, Float64[np.ndarray, " K"]], theme: Theme
) -> None:
    styles, height = line_styles(list(mixtures)), 0.8 / len(mixtures)
    for number, (name, weights) in enumerate(mixtures.items()):
        places = np.arange(len(domains)) + (number - (len(mixtures) - 1) / 2) * height
        ax.barh(places, weights, height, color=styles[name].color)
    _by_domain(ax, domains)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    bars = [(Line2D([], [], linewidth=6, color=styles[name].color), name) for name in mixtures]
    legend(ax, theme, bars, loc="best")
    label(ax, theme, title="mixtures")


def _sensitivities(
    ax: Axes,
    domains: Sequence[str],
    metrics: Mapping[str, Predictions],
    styles: Mapping[str, LineStyle],
    theme: Theme,
) -> None:
    places = np.arange(len(domains))
    for name, each in metrics.items():
        ax.plot(each.sensitivity / 100, places, "o", color=styles[name].color, markersize=4, alpha=0.7)
    mean = np.mean([each.sensitivity for each in metrics.values()], axis=0)
    ax.plot(mean / 100, places, "|", color=theme.text, markersize=12, markeredgewidth=2)
    ax.axvline(0.0, color=theme.text, linewidth=0.8, zorder=0)
    _by_domain(ax, domains)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    label(ax, theme, x="change of the metric for 1 % more of the domain", title="sensitivity (bar: the mean)")


def _by_domain(ax: Axes, domains: Sequence[str]) -> None:
    ax.set_ylim(len(domains) - 0.5, -0.5)
    ax.yaxis.set_major_locator(FixedLocator(range(len(domains))))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_yticklabels(list(domains), parse_math=False)
