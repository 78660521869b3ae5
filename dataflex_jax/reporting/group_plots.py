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


def _of_mixer(*path: str) -> Callable[[str], _Find]:
    return lambda domain: lambda run: series(mixer_records(run), *path, domain)


def _of_metrics(*path: str) -> Callable[[str], _Find]:
    return lambda name: lambda run: series(run.metrics, *path, name)


def _of_selections(*path: str) -> Callable[[str], _Find]:
    return lambda name: lambda run: series(run.policy, *path, name)


def _excess(domain: str) -> _Find:
    def find(run: RunRecords) -> _Curve:
        found = series(mixer_records(run), "observed", "excess", domain)
        return found if len(found[0]) else series(run.metrics, "domain_excess", domain)

    return find


# One plot a domain: (what is along y, where it is found).
_BY_DOMAIN: dict[str, tuple[str, Callable[[str], _Find]]] = {
    "mixture": ("sampling weight", _of_mixer("sampling_weights")),
    "loss_weights": ("domain weight in the loss", _of_mixer("state", "alpha")),
    "excess": ("excess loss [nats/token]", _excess),
    "domain_epochs": ("epochs of the domain's rows", _of_metrics("domain_epochs")),
    "selection": ("share of the selection", _of_selections("domain_share")),
}
# One plot a number: what it is called, and where it is found.
_NUMBERS: dict[str, dict[str, _Find]] = {
    "example_weights": {
        "example weight, mean": _of_metrics()("example_weight_mean"),
        "example weight, lowest": _of_metrics()("example_weight_min"),
        "example weight, highest": _of_metrics()("example_weight_max"),
        "effective sample size [rows]": _of_metrics()("effective_sample_size"),
    },
    "reach": {
        "coverage of the pool": _of_selections()("coverage"),
        "chosen again": _of_selections()("overlap"),
    },
    "selector_scores": {
        "score, mean": _of_selections()("score_mean"),
        "score, lowest": _of_selections()("score_min"),
        "score, highest": _of_selections()("score_max"),
    },
    "optimizer": {
        "learning rate": _of_metrics()("learning_rate"),
        "gradient norm": _of_metrics()("grad_norm"),
    },
    "throughput": {
        "tokens/s": _of_metrics()("tokens_per_second"),
        "MFU": _of_metrics()("mfu"),
    },
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
