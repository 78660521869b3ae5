"""The pictures of selections/: histograms of scores and lengths, and what two choices have in common.

Every figure is a function of `RunRecords`, returns None where the run has nothing to draw, and touches no global state.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from dataflex_jax.reporting.plot_style import (
    LIGHT,
    Chart,
    Theme,
    draw,
    draw_grid,
    label,
    legend,
    line_styles,
    new_figure,
)
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.selections import Selection, read_selection, selection_paths

_MOST_HISTOGRAMS = 4
_MOST_OVERLAPS = 16
_BINS = 40


def score_histograms_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """One plot a choice: the shares of the candidates and of the chosen rows by score; None where scores are alike."""
    choices = [read_selection(path) for path in selection_paths(run, _MOST_HISTOGRAMS)]
    if all(np.ptp(_known_scores(chosen)) == 0 for chosen in choices):
        return None
    figure, axes = new_figure(theme, 3.4 * len(choices) + 0.8, 3.0, columns=len(choices))
    styles = line_styles(["candidates", "chosen"])
    for ax, chosen in zip(axes, choices, strict=True):
        finite = _known_scores(chosen)
        edges = np.histogram_bin_edges(np.concatenate([finite, chosen.scores]), _BINS)
        of = {"candidates": finite} if chosen.all_scores is not None else {}
        for name, scores in {**of, "chosen": chosen.scores}.items():
            _draw_histogram(ax, name, np.histogram(scores, edges)[0], edges, styles[name].color)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        label(ax, theme, x="score", title=f"after step {chosen.step}")
    figure.supylabel("share of the rows", color=theme.text, fontsize=9.5)
    entries = [(Patch(facecolor=style.color, alpha=0.4), name) for name, style in styles.items()]
    legend(figure, theme, entries, loc="outside upper left", ncols=2, frameon=False)
    return figure


def length_histogram_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """The shares of the candidates and of the rows of some choices by length; None where all rows are of one length."""
    choices = [read_selection(path) for path in selection_paths(run, _MOST_HISTOGRAMS)]
    choices = [chosen for chosen in choices if chosen.lengths is not None and len(chosen.pool_lengths) > 1]
    if not choices:
        return None
    lengths, rows = choices[-1].pool_lengths, choices[-1].pool_rows
    edges = np.histogram_bin_edges(lengths, min(_BINS // 2, int(lengths.max() - lengths.min())))
    shares = {"candidates": np.histogram(lengths, edges, weights=rows)[0]}
    shares |= {f"chosen after step {c.step}": np.histogram(c.lengths, edges)[0] for c in choices}
    figure, (ax,) = new_figure(theme, 7.6, 3.4)
    styles = line_styles(list(shares))
    for name, counts in shares.items():
        _draw_histogram(ax, name, counts, edges, styles[name].color, filled=name == "candidates")
    ax.set_ylim(bottom=0)
    label(ax, theme, x="length [tokens]", y="share of the rows")
    legend(ax, theme, [(Line2D([], [], color=style.color, linewidth=1.5), name) for name, style in styles.items()])
    return figure


def overlaps_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """Of every two choices, the share of one's distinct rows that the other has too; None of less than three."""
    choices = [read_selection(path) for path in selection_paths(run, _MOST_OVERLAPS)]
    if len(choices) < 3:
        return None
    distinct = [np.unique(chosen.ids) for chosen in choices]
    shares = np.array([[np.isin(ours, theirs).mean() for theirs in distinct] for ours in distinct])
    side = 1.6 + 0.36 * len(choices)
    figure, (ax,) = new_figure(theme, side + 1.4, side)
    draw_grid(ax, theme, np.array([chosen.step for chosen in choices]), shares)
    label(ax, theme, x="that are in the choice after step", y="rows of the choice after step")
    return figure


def _known_scores(chosen: Selection) -> np.ndarray:
    """Those of all candidates that have one, or of the chosen alone where no others were kept; float64."""
    kept = chosen.scores if chosen.all_scores is None else chosen.all_scores
    return kept[np.isfinite(kept)].astype(np.float64)


def _draw_histogram(
    ax: Axes, name: str, counts: np.ndarray, edges: np.ndarray, color: str, *, filled: bool = True
) -> None:
    """A histogram's shares, drawn over the middles of its bins."""
    middles, shares = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    draw(ax, name, middles, shares, color=color, linewidth=1.4, drawstyle="steps-mid")
    if filled:
        ax.fill_between(middles, shares, step="mid", color=color, alpha=0.25, linewidth=0)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
