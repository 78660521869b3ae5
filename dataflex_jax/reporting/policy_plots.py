"""The pictures of what policies decide: mixtures, domain weights, excess losses, example weights, selections.

Every figure is a function of `RunRecords`, returns None where the run has nothing to draw, and touches no global state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from dataflex_jax.reporting.plot_style import (
    LIGHT,
    Band,
    Chart,
    LineStyle,
    Theme,
    draw,
    draw_areas,
    draw_band,
    label,
    legend,
    line_styles,
    new_figure,
    smooth,
)
from dataflex_jax.reporting.run_folder import RunRecords, series

_LINE = "#1f77b4"


def mixer_records(run: RunRecords) -> list[dict[str, Any]]:
    """The lines of policy.jsonl that a mixer wrote; selectors write there too."""
    return [record for record in run.policy if record.get("sampling_weights")]


def _shares(names: Sequence[str], shares: np.ndarray, styles: Mapping[str, LineStyle]) -> list[tuple[Patch, str]]:
    """Legend entries with each domain's first and last share, listed from the top, as the areas lie."""
    texts = [f"{name}  {100 * shares[0, i]:.1f} → {100 * shares[-1, i]:.1f} %" for i, name in enumerate(names)]
    return [(Patch(facecolor=styles[name].fill), text) for name, text in zip(names, texts, strict=True)][::-1]


def mixture_figure(
    run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT, title: str = ""
) -> Chart | None:
    """The mixer's sampling weights over time, stacked; below, what was drawn with, where that is something else.

    The legend gives each domain's first and last share. Drawn-with counts as something else where it is more than 2
    percentage points away from the weights at any step, which publishing late or in steps can do.
    """
    records = mixer_records(run)
    if not records:
        return None
    # A resumed run may have a domain more than it began with.
    names = [name for name in styles if any(name in records[end]["sampling_weights"] for end in (0, -1))]
    steps = np.array([record["step"] for record in records])
    weights = np.array([[record["sampling_weights"].get(name, 0.0) for name in names] for record in records])
    drawn_steps, drawn = steps[:0], weights[:0]
    with_drawn = [record for record in records if (record.get("observed") or {}).get("drawn_with")]
    if with_drawn:
        drawn_steps = np.array([record["step"] for record in with_drawn])
        drawn = np.array([[r["observed"]["drawn_with"].get(name, 0.0) for name in names] for r in with_drawn])
    two = len(drawn) > 0 and bool(np.abs(drawn - weights[np.isin(steps, drawn_steps)]).max() > 0.02)

    height = max(3.6, 0.7 + 0.21 * len(names))
    figure, axes = new_figure(theme, 8.6, height * (1.7 if two else 1.0), rows=2 if two else 1)
    chosen = {name: styles[name] for name in names}
    draw_areas(axes[0], theme, steps, weights, chosen)
    label(axes[0], theme, x="" if two else "step", y="sampling weight", title=title)
    legend(axes[0], theme, _shares(names, weights, styles), title="first → last")
    if two:
        draw_areas(axes[1], theme, drawn_steps, drawn, chosen, step="post")
        label(axes[1], theme, x="step", y="drawn with")
    return figure


def _is_by_domain(value: Any) -> bool:
    """Whether a part of a mixer's state is one number a domain; parts may be nested in any way."""
    return isinstance(value, Mapping) and all(isinstance(number, int | float) for number in value.values())


def loss_weights_figure(run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT) -> Chart | None:
    """The domain weights alpha that DoReMi's loss has, over time, stacked, with first and last shares in the legend."""
    states = {record["step"]: record.get("state") for record in mixer_records(run)}
    found = {step: state.get("alpha") for step, state in states.items() if isinstance(state, Mapping)}
    alphas = {step: alpha for step, alpha in found.items() if _is_by_domain(alpha)}
    names = [name for name in styles if any(name in alpha for alpha in alphas.values())]
    if not names:
        return None
    steps = np.array(list(alphas))
    weights = np.array([[alpha.get(name, 0.0) for name in names] for alpha in alphas.values()])
    figure, (ax,) = new_figure(theme, 8.6, max(3.6, 0.7 + 0.21 * len(names)))
    draw_areas(ax, theme, steps, weights, {name: styles[name] for name in names})
    label(ax, theme, x="step", y="domain weight in the loss")
    legend(ax, theme, _shares(names, weights, styles), title="first → last")
    return figure


def excess_figure(run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT) -> Chart | None:
    """Each domain's mean excess loss over the reference model, smoothed."""
    figure, (ax,) = new_figure(theme, 8.6, max(3.6, 0.7 + 0.21 * len(styles)))
    entries = []
    for name, style in styles.items():
        steps, excess = series(mixer_records(run), "observed", "excess", name)
        if not len(steps):
            steps, excess = series(run.metrics, "domain_excess", name)
        if len(steps):
            draw(ax, name, steps, smooth(excess), color=style.color, linestyle=style.dashes, linewidth=1.5)
            entries.append((Line2D([], [], color=style.color, linestyle=style.dashes, linewidth=2), name))
    if not entries:
        return None
    ax.set_ylim(bottom=0)
    label(ax, theme, x="step", y="excess loss [nats/token]")
    legend(ax, theme, entries)
    return figure


def _marker(steps: np.ndarray) -> dict[str, Any]:
    """Dots on a line of few points."""
    return {"marker": "o", "markersize": 4} if len(steps) <= 50 else {}


def _draw_ranges(
    ax: Axes, theme: Theme, ylabel: str, ranges: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]
) -> None:
    """Means with their ranges, each as the curves (lowest, mean, highest) of the same steps."""
    entries = []
    for (name, (low, mean, high)), style in zip(ranges.items(), line_styles(list(ranges)).values(), strict=True):
        look = {"color": style.color, "linewidth": 1.5, **_marker(mean[0])}
        draw_band(ax, f"{name}mean", Band(*mean, low[1], high[1]), **look)
        entries.append((Line2D([], [], **look), f"{name}mean"))
        entries.append((Patch(facecolor=style.color, alpha=0.2), f"{name}min to max"))
    label(ax, theme, x="step", y=ylabel)
    legend(ax, theme, entries)


def example_weights_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """The weighters' example weights, mean and range of the batch; below, the effective sample size."""
    ranges = [series(run.metrics, f"example_weight_{name}") for name in ("min", "mean", "max")]
    if not all(len(steps) == len(ranges[0][0]) > 0 for steps, _ in ranges):
        return None
    steps, sizes = series(run.metrics, "effective_sample_size")
    rows = 2 if len(steps) else 1
    figure, axes = new_figure(theme, 7.6, 0.8 + 2.8 * rows, rows=rows)
    _draw_ranges(axes[0], theme, "example weight", {"": ranges})
    if len(steps):
        draw(axes[1], "effective sample size", steps, sizes, color=_LINE, linewidth=1.5)
        axes[1].set_ylim(bottom=0)
        label(axes[0], theme, y="example weight")
        label(axes[1], theme, x="step", y="effective sample size [rows]")
    return figure


def selection_figure(run: RunRecords, styles: Mapping[str, LineStyle], theme: Theme = LIGHT) -> Chart | None:
    """The share of each domain in what was chosen, until the next update, stacked; below, coverage and overlap.

    Coverage is the share of the pool that was ever chosen, overlap that of a choice which was in the one before too.
    Of one domain, and where a run of an earlier version does not say the shares, there is the lower panel alone.
    """
    records = [record for record in run.policy if record.get("coverage") is not None]
    if not records:
        return None
    composed = [record for record in records if record.get("domain_share")]
    names = [name for name in styles if any(name in record["domain_share"] for record in composed)]
    two = len(names) > 1
    height = max(3.6, 0.7 + 0.21 * len(names)) if two else 0.4
    figure, axes = new_figure(theme, 8.6, height + 2.4, rows=2 if two else 1)
    if two:
        steps = np.array([record["step"] for record in composed])
        shares = np.array([[record["domain_share"].get(name, 0.0) for name in names] for record in composed])
        end = max(steps[-1], run.metrics[-1]["step"] if run.metrics else 0)
        draw_areas(axes[0], theme, steps, shares, {name: styles[name] for name in names}, end, step="post")
        label(axes[0], theme, y="share of the selection")
        legend(axes[0], theme, _shares(names, shares, styles), title="first → last")
        axes[1].set_xlim(axes[0].get_xlim())
    _draw_reach(axes[-1], theme, records)
    return figure


def _draw_reach(ax: Axes, theme: Theme, records: Sequence[Mapping[str, Any]]) -> None:
    entries = []
    curves = {"coverage": "of the pool ever chosen", "overlap": "chosen again"}
    for (field, text), style in zip(curves.items(), line_styles(list(curves)).values(), strict=True):
        steps, values = series(records, field)
        if len(steps):
            look = {"color": style.color, "linewidth": 1.5, **_marker(steps)}
            draw(ax, field, steps, values, clip_on=False, **look)
            entries.append((Line2D([], [], **look), f"{100 * values[-1]:.1f} % {text}"))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    label(ax, theme, x="step", y="coverage, overlap")
    legend(ax, theme, entries, title="at the last update")


def selector_scores_figure(run: RunRecords, theme: Theme = LIGHT) -> Chart | None:
    """The scores of the examples each selector looked at, by update: mean, with their range."""
    ranges = {}
    for policy in dict.fromkeys(record.get("policy") for record in run.policy if "score_mean" in record):
        records = [record for record in run.policy if record.get("policy") == policy]
        of_policy = [series(records, f"score_{name}") for name in ("min", "mean", "max")]
        if all(len(steps) == len(of_policy[0][0]) > 0 for steps, _ in of_policy):
            ranges[f"{policy}: "] = of_policy
    if not ranges:
        return None
    figure, (ax,) = new_figure(theme, 7.6, 3.6)
    _draw_ranges(ax, theme, "score", ranges)
    return figure
