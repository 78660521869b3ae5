"""The pictures of a run: `plot_run` writes them as PNG, the report puts them on a page.

Every figure is a function of `RunRecords`, returns None where the run has nothing to draw, and touches no global state.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from dataflex_jax.files import file_name
from dataflex_jax.reporting.bands import Groups, band
from dataflex_jax.reporting.evaluation_plots import evaluator_figure
from dataflex_jax.reporting.evaluations import HELD_OUT, evaluations, splits
from dataflex_jax.reporting.plot_style import (
    LIGHT,
    Chart,
    LineStyle,
    Theme,
    draw,
    draw_band,
    label,
    legend,
    line_styles,
    log_if_steep,
    new_figure,
    smooth,
)
from dataflex_jax.reporting.policy_plots import (
    example_weights_figure,
    excess_figure,
    loss_weights_figure,
    mixer_records,
    mixture_figure,
    selection_figure,
    selector_scores_figure,
)
from dataflex_jax.reporting.run_folder import RunRecords, series
from dataflex_jax.reporting.selection_plots import length_histogram_figure, overlaps_figure, score_histograms_figure

_LINE = "#1f77b4"
_HELD_OUT = "#ff7f0e"


def domain_names(run: RunRecords) -> list[str]:
    """Every domain that a run trained on or has a held-out loss of, in the order of the run's own files."""
    names: dict[str, None] = {}
    mixer = mixer_records(run)
    for records, field in (
        (mixer[:1] + mixer[-1:], "sampling_weights"),
        (run.metrics, "domain_loss"),
        (evaluations(run), "domains"),
    ):
        for record in records:
            names.update(dict.fromkeys(record.get(field) or {}))
    return list(names)


def loss_figure(groups: Groups, theme: Theme = LIGHT) -> Chart | None:
    """Training loss (smoothed; of one run also as logged) and overall held-out nll over steps; one colour a group."""
    figure, (ax,) = new_figure(theme, 7.6, 4.0)
    styles = line_styles(list(groups))
    alone = len(groups) == 1
    entries, curves = [], []
    for name, runs in groups.items():
        style = styles[name]
        prefix = "" if alone else f"{name}: "
        logged = [series(run.metrics, "loss") for run in runs]
        if alone and len(runs) == 1 and len(logged[0][0]):
            curves.append(_draw_noisy(ax, "training", *logged[0], style.color))
            entries.append((Line2D([], [], color=style.color, linewidth=1.6), "training"))
        elif len((training := band([(steps, smooth(losses)) for steps, losses in logged])).steps):
            draw_band(ax, f"{prefix}training, smoothed", training, color=style.color, linewidth=1.6)
            curves.append(training.values)
            entries.append((Line2D([], [], color=style.color, linewidth=1.6), f"{prefix}training"))
        held_out = band([series(evaluations(run), "overall", "nll") for run in runs])
        if len(held_out.steps):
            color = _HELD_OUT if alone else style.color
            look = {"color": color, "linestyle": (0, (3, 1.5)), "marker": "o", "markersize": 4, "linewidth": 1.1}
            draw_band(ax, f"{prefix}held out", held_out, **look)
            entries.append((Line2D([], [], **look), f"{prefix}held out ({HELD_OUT})"))
            curves.append(held_out.values)
    if not curves:
        return None
    log_if_steep(ax, *curves)
    label(ax, theme, x="step", y="loss [nats/token]")
    legend(ax, theme, entries, **({} if len(entries) > 6 else {"loc": "best"}))
    return figure


def domain_losses_figure(run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT) -> Chart | None:
    """Each domain's training loss, smoothed, as a line, and its held-out nll as markers."""
    mixer = mixer_records(run)
    figure, (ax,) = new_figure(theme, 8.6, max(4.2, 0.9 + 0.21 * len(styles)))
    entries, curves, marked = [], [], False
    for name, style in styles.items():
        steps, losses = series(mixer, "observed", "domain_loss", name)
        if not len(steps):
            steps, losses = series(run.metrics, "domain_loss", name)
        eval_steps, held_out = series(evaluations(run), "domains", name, "nll")
        if len(steps):
            curve = smooth(losses)
            draw(ax, f"{name}, smoothed", steps, curve, color=style.color, linestyle=style.dashes, linewidth=1.5)
            curves.append(curve)
        if len(eval_steps):
            draw(
                ax,
                f"{name}, held out",
                eval_steps,
                held_out,
                linestyle="none",
                marker=style.marker,
                markersize=4.5,
                markerfacecolor=style.color,
                markeredgecolor=theme.background,
                markeredgewidth=0.6,
            )
            curves.append(held_out)
            marked = True
        if len(steps) or len(eval_steps):
            entries.append((Line2D([], [], color=style.color, linestyle=style.dashes, linewidth=2), name))
    if not curves:
        return None
    if marked:
        entries.append((Line2D([], [], linestyle="none", marker="o", markersize=4.5, color=theme.text), "held out"))
    log_if_steep(ax, *curves)
    label(ax, theme, x="step", y="loss [nats/token]")
    legend(ax, theme, entries)
    return figure


def _panels(run: RunRecords, theme: Theme, panels: Sequence[tuple[str, str, float]]) -> tuple[Chart, dict] | None:
    """Numbers of metrics.jsonl one above the other, those that the run has: (field, label, factor).

    Returns the figure and {field: (axes, steps, values)}, with axes still empty.
    """
    data = {field: (text, *series(run.metrics, field), factor) for field, text, factor in panels}
    data = {field: entry for field, entry in data.items() if len(entry[1])}
    if not data:
        return None
    figure, axes = new_figure(theme, 7.6, 0.5 + 2.3 * len(data), rows=len(data))
    drawable = {}
    for ax, (field, (text, steps, values, factor)) in zip(axes, data.items(), strict=True):
        label(ax, theme, x="step" if ax is axes[-1] else "", y=text)
        drawable[field] = (ax, steps, values * factor)
    return figure, drawable


def _draw_noisy(ax: Axes, name: str, steps: np.ndarray, values: np.ndarray, color: str) -> np.ndarray:
    """Draws the numbers pale and their mean strong, or, where they are few, the numbers; returns the strong line."""
    if len(values) <= 50:
        draw(ax, name, steps, values, color=color, linewidth=1.6)
        return values
    curve = smooth(values)
    draw(ax, name, steps, values, color=color, linewidth=0.7, alpha=0.3)
    draw(ax, f"{name}, smoothed", steps, curve, color=color, linewidth=1.6)
    return curve


def optimizer_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """Learning rate and gradient norm."""
    panels = _panels(run, theme, (("learning_rate", "learning rate", 1.0), ("grad_norm", "gradient norm", 1.0)))
    if panels is None:
        return None
    figure, drawable = panels
    if "learning_rate" in drawable:
        ax, steps, values = drawable["learning_rate"]
        draw(ax, "learning rate", steps, values, color=_LINE, linewidth=1.6)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        ax.yaxis.get_offset_text().set_color(theme.text)
    if "grad_norm" in drawable:
        ax, steps, values = drawable["grad_norm"]
        log_if_steep(ax, _draw_noisy(ax, "gradient norm", steps, values, _LINE))
    return figure


def throughput_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """Tokens per second and, where the peak is known, the model FLOPs utilisation."""
    panels = _panels(run, theme, (("tokens_per_second", "tokens/s", 1.0), ("mfu", "MFU [% of peak]", 100.0)))
    if panels is None:
        return None
    figure, drawable = panels
    for field, (ax, steps, values) in drawable.items():
        draw(ax, field, steps, values, color=_LINE, linewidth=1.4)
        ax.set_ylim(bottom=0)
    if "tokens_per_second" in drawable:
        drawable["tokens_per_second"][0].yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def domain_epochs_figure(run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT) -> Chart | None:
    """How often each domain's rows have been used."""
    figure, (ax,) = new_figure(theme, 8.6, max(3.6, 0.7 + 0.21 * len(styles)))
    entries = []
    for name, style in styles.items():
        steps, epochs = series(run.metrics, "domain_epochs", name)
        if len(steps):
            draw(ax, name, steps, epochs, color=style.color, linestyle=style.dashes, linewidth=1.5)
            handle = Line2D([], [], color=style.color, linestyle=style.dashes, linewidth=2)
            entries.append((handle, f"{name}  {epochs[-1]:.3g}"))
    if not entries:
        return None
    ax.set_ylim(bottom=0)
    label(ax, theme, x="step", y="epochs of the domain's rows")
    legend(ax, theme, entries, title="at the end")
    return figure


def router_loads_figure(run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT) -> Chart | None:
    """What share of each domain's tokens each expert of the last block got, over the last quarter of the lines."""
    lines = [record["domain_router_load"] for record in run.metrics if record.get("domain_router_load")]
    late = lines[-max(1, len(lines) // 4) :]
    figure, (ax,) = new_figure(theme, 8.6, max(3.6, 0.7 + 0.21 * len(styles)))
    entries = []
    for name, style in styles.items():
        loads = [line[name] for line in late if line.get(name)]
        if loads:
            mean = np.mean(loads, axis=0)
            look = {"color": style.color, "linestyle": style.dashes}
            draw(ax, name, np.arange(len(mean)), mean, linewidth=1.5, drawstyle="steps-mid", **look)
            entries.append((Line2D([], [], linewidth=2, **look), name))
    if not entries:
        return None
    ax.set_ylim(bottom=0)
    label(ax, theme, x="expert of the last block", y="share of the domain's tokens")
    legend(ax, theme, entries)
    return figure


def run_figures(
    run: RunRecords, styles: Mapping[str, LineStyle] | None = None
) -> dict[str, Callable[[Theme], Chart | None]]:
    """The figures of one run by file name, each to be drawn in a theme."""
    domains = line_styles(domain_names(run)) if styles is None else styles
    one = {run.folder.name: [run]}
    return {
        "loss": lambda theme: loss_figure(one, theme),
        "domain_losses": lambda theme: domain_losses_figure(run, domains, theme),
        "mixture": lambda theme: mixture_figure(run, domains, theme),
        "loss_weights": lambda theme: loss_weights_figure(run, domains, theme),
        "excess": lambda theme: excess_figure(run, domains, theme),
        "domain_epochs": lambda theme: domain_epochs_figure(run, domains, theme),
        "router_loads": lambda theme: router_loads_figure(run, domains, theme),
        "example_weights": lambda theme: example_weights_figure(run, theme),
        "selection": lambda theme: selection_figure(run, domains, theme),
        "overlaps": lambda theme: overlaps_figure(run, theme),
        "selector_scores": lambda theme: selector_scores_figure(run, theme),
        "score_histograms": lambda theme: score_histograms_figure(run, theme),
        "lengths": lambda theme: length_histogram_figure(run, theme),
        "optimizer": lambda theme: optimizer_figure(run, theme),
        "throughput": lambda theme: throughput_figure(run, theme),
        **{
            f"eval_{file_name(split)}": functools.partial(evaluator_figure, one, split)
            for split in splits([run])
            if split != HELD_OUT
        },
    }


def plot_run(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Draws what the run folder has into `plots/*.png` and returns the files written.

    Raises:
        InputError: not a run folder, or a malformed file in it.
    """
    run = RunRecords.load(run_folder)
    folder = run.folder / "plots"
    written = []
    for name, figure_in in run_figures(run).items():
        figure = figure_in(LIGHT)
        if figure is not None:
            folder.mkdir(exist_ok=True)
            path = folder / f"{name}.png"
            path.write_bytes(figure.drawn("png"))
            written.append(path)
    return written
