"""The pictures of groups of runs: what each run's pictures show, as small plots with a line and a band a group."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.ticker import EngFormatter

from dataflex_jax.reporting.bands import Groups, band
from dataflex_jax.reporting.evaluation_plots import Plot, small_plots
from dataflex_jax.reporting.plot_style import LIGHT, Band, Chart, Theme
from dataflex_jax.reporting.policy_plots import mixer_records
from dataflex_jax.reporting.run_folder import RunRecords, series

_Curve = tuple[np.ndarray, np.ndarray]
_Find = Callable[[RunRecords], _Curve]


def _in_mixture(*path: str) -> _Find:
    return lambda run: series(mixer_records(run), *path)


def _in_metrics(*path: str) -> _Find:
    return lambda run: series(run.metrics, *path)


def _in_policy(*path: str) -> _Find:
    return lambda run: series(run.policy, *path)


def _excess(domain: str) -> _Find:
    def find(run: RunRecords) -> _Curve:
        found = series(mixer_records(run), "observed", "excess", domain)
        return found if len(found[0]) else series(run.metrics, "domain_excess", domain)

    return find


# One plot a domain: (what is along y, where a domain's curve is found).
_BY_DOMAIN: dict[str, tuple[str, Callable[[str], _Find]]] = {
    "mixture": ("sampling weight", lambda domain: _in_mixture("sampling_weights", domain)),
    "loss_weights": ("domain weight in the loss", lambda domain: _in_mixture("state", "alpha", domain)),
    "excess": ("excess loss [nats/token]", _excess),
    "domain_epochs": ("epochs of the domain's rows", lambda domain: _in_metrics("domain_epochs", domain)),
    "selection": ("share of the selection", lambda domain: _in_policy("domain_share", domain)),
}
# One plot a number: what it is called, and where it is found.
_NUMBERS: dict[str, dict[str, _Find]] = {
    "example_weights": {
        "example weight, mean": _in_metrics("example_weight_mean"),
        "example weight, lowest": _in_metrics("example_weight_min"),
        "example weight, highest": _in_metrics("example_weight_max"),
        "effective sample size [rows]": _in_metrics("effective_sample_size"),
    },
    "reach": {"coverage of the pool": _in_policy("coverage"), "chosen again": _in_policy("overlap")},
    "selector_scores": {
        "score, mean": _in_policy("score_mean"),
        "score, lowest": _in_policy("score_min"),
        "score, highest": _in_policy("score_max"),
    },
    "optimizer": {"learning rate": _in_metrics("learning_rate"), "gradient norm": _in_metrics("grad_norm")},
    "throughput": {"tokens/s": _in_metrics("tokens_per_second"), "MFU": _in_metrics("mfu")},
}


def group_figures(groups: Groups, domains: Sequence[str]) -> dict[str, Callable[[Theme], Chart | None]]:
    """The figures that show all groups at once, by the names that a run's own figures have."""

    def by_domain(key: str, theme: Theme = LIGHT) -> Chart | None:
        ylabel, find = _BY_DOMAIN[key]
        figure = _figure(groups, [(domain, find(domain)) for domain in domains], theme)
        if figure is not None:
            figure.supylabel(ylabel, color=theme.text, fontsize=9.5)
        return figure

    def numbers(key: str, theme: Theme = LIGHT) -> Chart | None:
        return _figure(groups, list(_NUMBERS[key].items()), theme)

    return {
        **{key: lambda theme, key=key: by_domain(key, theme) for key in _BY_DOMAIN},
        **{key: lambda theme, key=key: numbers(key, theme) for key in _NUMBERS},
    }


def _figure(groups: Groups, found: Sequence[tuple[str, _Find]], theme: Theme) -> Chart | None:
    plots: list[Plot] = [
        (title, {name: band([find(run) for run in runs]) for name, runs in groups.items()}) for title, find in found
    ]
    drawn = small_plots(theme, plots, list(groups))
    if drawn is None:
        return None
    figure, axes, plots = drawn
    for ax, (_, curves) in zip(axes, plots, strict=True):
        if _highest(curves) >= 10_000:
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _highest(curves: Mapping[str, Band]) -> float:
    return max((float(curve.high.max()) for curve in curves.values() if len(curve.steps)), default=0.0)
