"""How the pictures look: themes, colours that stay apart, axes, legends, smoothing. No global matplotlib state.

What is drawn by `draw`, `draw_band` and `draw_areas` is remembered by its `Chart`, whose `csv` therefore has the
numbers of the picture and no others.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

# Ten hues, and the same ten lighter: neighbours in a stack never share a hue, and 20 areas stay apart.
_HUES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_TINTS = ("#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7", "#dbdb8d", "#9edae5")
# Ten lines of one dash each; a pale line would be lost on white.
_DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 0.8)))
_MARKERS = ("o", "s", "^")
_MAX_POINTS = 1500
_DPI = 130


@dataclass(frozen=True)
class Theme:
    """The colours of everything that is not data."""

    background: str
    text: str
    grid: str


LIGHT = Theme(background="#ffffff", text="#24292f", grid="#d8dee4")
DARK = Theme(background="#161b22", text="#d0d7de", grid="#30363d")


@dataclass(frozen=True)
class LineStyle:
    """How one domain, or one run, looks in every figure: as a line, as a marker, as an area."""

    color: str
    dashes: Any
    marker: str
    fill: str


def line_styles(names: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each name, in order: no two alike up to 30 lines and 20 areas."""
    return {
        name: LineStyle(
            color=_HUES[i % 10],
            dashes=_DASHES[i // 10 % 3],
            marker=_MARKERS[i // 10 % 3],
            fill=(_HUES + _TINTS)[i % 20],
        )
        for i, name in enumerate(names)
    }


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a 25th of the points around each; narrower towards the start, to keep the level of a steep one."""
    half = len(values) // 50
    index = np.arange(len(values))
    low = index - np.minimum(half, index)
    high = np.minimum(len(values), index + np.minimum(half, index) + 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[high] - total[low]) / (high - low)


def thin(*arrays: np.ndarray) -> list[np.ndarray]:
    """The same points of each array, no more than a picture can show, the first and the last among them."""
    length = len(arrays[0])
    if length <= _MAX_POINTS:
        return list(arrays)
    keep = np.unique(np.linspace(0, length - 1, _MAX_POINTS).round().astype(int))
    return [array[keep] for array in arrays]


class Band(NamedTuple):
    """A curve, and what lies around it.

    Attributes:
        steps: int64 [S], or other places along x.
        values: float64 [S].
        low: float64 [S]; of a curve alone, `values`.
        high: float64 [S]; of a curve alone, `values`.
    """

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


class _Drawn(NamedTuple):
    ax: Axes
    name: str
    band: Band


class Chart(Figure):
    """A figure that remembers the numbers that it was drawn from."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._drawn: list[_Drawn] = []

    def remember(self, ax: Axes, name: str, band: Band) -> None:
        """Notes what is drawn under a name in one of the plots."""
        self._drawn.append(_Drawn(ax, name, band))

    def drawn(self, kind: str) -> bytes:
        """The contents of a file: "png" or "pdf"."""
        file = io.BytesIO()
        self.savefig(file, format=kind, facecolor=self.get_facecolor())
        return file.getvalue()

    def csv(self) -> str:
        """All points, one a line: the plot, the curve, its place along x, its value, and where bands are, their ends.

        Floats have all their digits.
        """
        banded = any(band.low is not band.values for _, _, band in self._drawn)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["plot", "curve", "x", "value", *(["low", "high"] if banded else [])])
        for ax, name, band in self._drawn:
            plot = ax.get_title(loc="left") or ax.get_ylabel()
            columns = band if banded else band[:2]
            for point in zip(*(column.tolist() for column in columns), strict=True):
                writer.writerow([plot, name, *point])
        return text.getvalue()


def draw(ax: Axes, name: str, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Draws a line in matplotlib's `style`; a single point as a dot."""
    draw_band(ax, name, Band(steps, values, values, values), **style)


def draw_band(ax: Axes, name: str, band: Band, **style: Any) -> None:
    """Draws a line in matplotlib's `style`, and a pale area from the band's lower to its upper end."""
    ax.figure.remember(ax, name, band)
    steps, values, low, high = thin(*band)
    if band.low is not band.values:
        ax.fill_between(steps, low, high, color=style.get("color"), alpha=0.2, linewidth=0)
    dot = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
    ax.plot(steps, values, **{**dot, **style})


def draw_areas(
    ax: Axes,
    theme: Theme,
    steps: np.ndarray,
    shares: np.ndarray,
    styles: Mapping[str, LineStyle],
    end: int | None = None,
    **how: Any,
) -> None:
    """Stacks shares of 1.

    Args:
        ax: where.
        theme: of the picture.
        steps: int64 [S].
        shares: float64 [S, names].
        styles: of each name.
        end: until which step the last shares hold.
        **how: of matplotlib's `stackplot`.
    """
    for name, values in zip(styles, shares.T, strict=True):
        ax.figure.remember(ax, name, Band(steps, values, values, values))
    if end is not None:
        steps, shares = np.append(steps, end), np.concatenate([shares, shares[-1:]])
    steps, shares = thin(steps, shares)
    colors = [style.fill for style in styles.values()]
    ax.stackplot(steps, shares.T, colors=colors, edgecolor=theme.background, linewidth=0.4, **how)
    ax.set_ylim(0, 1)
    ax.set_xlim(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))


def draw_grid(ax: Axes, theme: Theme, steps: np.ndarray, shares: np.ndarray) -> None:
    """Draws shares of 1 as squares with their percentages, rows and columns by step.

    Args:
        ax: where.
        theme: of the picture.
        steps: int64 [S].
        shares: float64 [S, S].
    """
    image = ax.imshow(shares, cmap="viridis", vmin=0.0, vmax=1.0)
    for row, (step, values) in enumerate(zip(steps.tolist(), shares, strict=True)):
        ax.figure.remember(ax, f"after step {step}", Band(steps, values, values, values))
        for column, value in enumerate(values):
            color = "black" if value > 0.6 else "white"
            ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    ax.grid(False)
    ax.set_xticks(range(len(steps)), steps.tolist(), rotation=90)
    ax.set_yticks(range(len(steps)), steps.tolist())
    bar = ax.figure.colorbar(image, ax=ax, format=PercentFormatter(xmax=1.0))
    bar.ax.tick_params(colors=theme.text, labelsize=8.5)


def new_figure(theme: Theme, width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Chart, list[Axes]]:
    """A figure of `width` x `height` inches in the theme's colours, and its axes row by row, with steps along x."""
    figure = Chart(figsize=(width, height), dpi=_DPI, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_facecolor(theme.background)
        ax.tick_params(colors=theme.text, labelsize=9, which="both")
        ax.grid(True, color=theme.grid, linewidth=0.6)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_color(theme.grid)
            spine.set_visible(side in ("left", "bottom"))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, list(axes)


def label(ax: Axes, theme: Theme, *, x: str = "", y: str = "", title: str = "") -> None:
    """Names the axes, with units, and the plot."""
    ax.set_xlabel(x, color=theme.text, fontsize=9.5)
    ax.set_ylabel(y, color=theme.text, fontsize=9.5)
    # A "$" in a domain's or a run's name is a dollar sign.
    ax.set_title(title, color=theme.text, fontsize=10.5, loc="left", parse_math=False)


def legend(
    target: Axes | Figure, theme: Theme, entries: Sequence[tuple[Artist, str]], *, title: str = "", **where: Any
) -> None:
    """A legend of (handle, text) pairs: `where` is matplotlib's loc, ncols, ...; without it, right of the plot."""
    outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, "frameon": False}
    box = target.legend(
        [handle for handle, _ in entries],
        ["x" for _ in entries],
        title=title or None,
        fontsize=8.5,
        title_fontsize=8.5,
        handlelength=2.6,
        labelcolor=theme.text,
        facecolor=theme.background,
        edgecolor=theme.grid,
        alignment="left",
        **(where or outside),
    )
    box.get_title().set_color(theme.text)
    # Set afterwards: matplotlib drops labels that begin with "_" and would typeset a "$".
    for text, (_, words) in zip(box.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(words)


def log_if_steep(ax: Axes, *curves: np.ndarray) -> None:
    """A logarithmic y axis where the highest of the curves is more than three times the lowest."""
    values = np.concatenate(curves) if curves else np.zeros(0)
    if len(values) == 0 or values.min() <= 0 or values.max() < 3 * values.min():
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
