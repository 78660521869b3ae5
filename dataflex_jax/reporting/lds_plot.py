"""The picture of linear datamodeling scores: each file's with its interval, and what it foretold against what was."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, ScalarFormatter

from dataflex_jax.reporting.plot_style import LIGHT, Theme, label, legend, line_styles, new_figure

_MOST_SCATTERS = 3
_MOST_GROUPS = 8  # with colours of their own
_RANDOM = "random"

# A figure, and the ends of its interval.
Bounds = tuple[float, float, float]


class Scored(NamedTuple):
    """A file of scores.

    Attributes:
        lds: its LDS, and the ends of its interval.
        foretold: the sums of its scores over the subsets.
    """

    lds: Bounds
    foretold: Float64[np.ndarray, "M G"]


def lds_figure(
    files: Mapping[str, Scored],
    random: Bounds,
    losses: Float64[np.ndarray, "M G"],
    groups: Sequence[str],
    theme: Theme = LIGHT,
) -> Figure:
    """Left the LDS of all files and of random scores; then, of the best files, what they foretold against the losses.

    Sums and losses are standardised group by group.

    Args:
        files: the scores, by name.
        random: of random scores.
        losses: of the models.
        groups: names of the target groups.
        theme: the colours.
    """
    best = sorted(files, key=lambda name: -files[name].lds[0])[:_MOST_SCATTERS]
    height = max(3.2, 0.35 * (len(files) + 3))
    figure, axes = new_figure(theme, 3.6 + 3.0 * len(best), height, 1, 1 + len(best))
    _intervals(axes[0], {name: scored.lds for name, scored in files.items()} | {_RANDOM: random}, theme)
    styles = line_styles(groups)
    for ax, name in zip(axes[1:], best, strict=True):
        sums, measured = _standardised(files[name].foretold), -_standardised(losses)
        for place, group in enumerate(groups):
            color = styles[group].color if len(groups) <= _MOST_GROUPS else styles[groups[0]].color
            ax.plot(sums[:, place], measured[:, place], "o", color=color, markersize=3, alpha=0.7)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            axis.set_major_formatter(ScalarFormatter())
        label(ax, theme, x="sum of scores [std]", y="minus the loss [std]", title=f"{name}: {files[name].lds[0]:.2f}")
    if 1 < len(groups) <= _MOST_GROUPS:
        dots = [(Line2D([], [], marker="o", linestyle="", color=styles[group].color), group) for group in groups]
        legend(figure, theme, dots, loc="outside lower center", ncols=min(4, len(groups)), frameon=False)
    return figure


def _intervals(ax: Axes, figures: Mapping[str, Bounds], theme: Theme) -> None:
    for place, (name, (value, low, high)) in enumerate(figures.items()):
        color = theme.text if name == _RANDOM else next(iter(line_styles(["scores"]).values())).color
        ax.plot([low, high], [place, place], color=color, linewidth=1.5)
        ax.plot([value], [place], "o", color=color, markersize=5)
    ax.axvline(0.0, color=theme.grid, linewidth=1.2, zorder=0)
    ax.set_ylim(len(figures) - 0.5, -0.5)
    ax.yaxis.set_major_locator(FixedLocator(range(len(figures))))
    ax.set_yticklabels(list(figures), parse_math=False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    label(ax, theme, x="LDS", title="linear datamodeling score")


def _standardised(values: Float64[np.ndarray, "M G"]) -> Float64[np.ndarray, "M G"]:
    return (values - values.mean(axis=0)) / values.std(axis=0)
