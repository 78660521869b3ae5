"""The pictures of the page, section by section: those of all groups at once, and those of single runs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dataflex_jax.files import file_name
from dataflex_jax.reporting.bands import Groups
from dataflex_jax.reporting.evaluation_plots import evaluator_figure, held_out_by_domain_figure
from dataflex_jax.reporting.evaluations import HELD_OUT, splits
from dataflex_jax.reporting.group_plots import group_figures
from dataflex_jax.reporting.groups import are_single
from dataflex_jax.reporting.plot_style import DARK, LIGHT, Chart, Theme, line_styles
from dataflex_jax.reporting.plots import domain_names, loss_figure, run_figures
from dataflex_jax.reporting.run_folder import RunRecords

_TITLES = {
    "loss": "Loss",
    "domain_losses": "Loss by domain",
    "mixture": "Mixture",
    "loss_weights": "Domain weights in the loss",
    "excess": "Excess loss over the reference by domain",
    "domain_epochs": "Epochs by domain",
    "router_loads": "Router loads by domain",
    "example_weights": "Example weights",
    "selection": "Selections by domain, coverage and overlap",
    "reach": "Coverage and overlap of selections",
    "overlaps": "Overlap between selections",
    "selector_scores": "Selector scores",
    "score_histograms": "Scores of candidates and of what was chosen",
    "lengths": "Lengths of candidates and of what was chosen",
    "optimizer": "Learning rate and gradient norm",
    "throughput": "Throughput",
}
# Of groups these are drawn of one run each.
_OF_ONE_RUN = ("overlaps", "score_histograms", "lengths")

_Draw = Callable[[Theme], Chart | None]


@dataclass(frozen=True)
class Picture:
    """A figure in both themes.

    Attributes:
        title: above it; may be empty.
        name: of its files.
        width: at which its text has the page's size [CSS pixels].
        light: a PNG.
        dark: a PNG.
        chart: the light one.
    """

    title: str
    name: str
    width: int
    light: bytes
    dark: bytes
    chart: Chart


Section = tuple[str, list[Picture]]


def sections(runs: Mapping[str, RunRecords], groups: Groups) -> list[Section]:
    """All pictures by heading: [(heading, [picture])]."""
    return (
        _compared(groups)
        + _of_evaluators(groups)
        + (_of_runs(groups) if are_single(groups) else _of_groups(runs, groups))
    )


def _compared(groups: Groups) -> list[Section]:
    """The figures of the loss that hold all groups at once; of one run alone the run's own are enough."""
    if len(groups) < 2 and are_single(groups):
        return []
    domains = _all_domains(groups)
    return _sections(
        {
            "loss": ("Loss", functools.partial(loss_figure, groups)),
            "held_out_by_domain": (
                "Held-out nll by domain",
                functools.partial(held_out_by_domain_figure, groups, domains),
            ),
        }
    )


def _of_evaluators(groups: Groups) -> list[Section]:
    """What evaluators other than the held-out loss found."""
    names = splits(run for runs in groups.values() for run in runs)
    return _sections(
        {
            f"eval_{file_name(name)}": (f"{name} over steps", functools.partial(evaluator_figure, groups, name))
            for name in names
            if name != HELD_OUT
        }
    )


def _of_runs(groups: Groups) -> list[Section]:
    """Figure by figure, the runs beneath one another."""
    styles = line_styles(_all_domains(groups))
    figures = {name: run_figures(run, styles) for name, (run,) in groups.items()}
    return [
        (title, drawn)
        for key, title in _TITLES.items()
        if not (key == "loss" and len(groups) > 1)
        and (drawn := _one_a_run(key, {name: of_run[key] for name, of_run in figures.items() if key in of_run}))
    ]


def _of_groups(runs: Mapping[str, RunRecords], groups: Groups) -> list[Section]:
    """Figure by figure, all groups at once; what cannot be drawn so, of the first run of each."""
    domains = _all_domains(groups)
    together = group_figures(groups, domains)
    names = {id(run): name for name, run in runs.items()}
    firsts = {names[id(of_group[0])]: run_figures(of_group[0], line_styles(domains)) for of_group in groups.values()}
    found = []
    for key, title in _TITLES.items():
        if key in together:
            found += _sections({key: (title, together[key])})
        elif key in _OF_ONE_RUN:
            drawn = _one_a_run(key, {name: of_run[key] for name, of_run in firsts.items()})
            found += [(title, drawn)] if drawn else []
    return found


def _sections(figures: Mapping[str, tuple[str, _Draw]]) -> list[Section]:
    """A section a figure."""
    pictures = [(title, _picture("", name, draw)) for name, (title, draw) in figures.items()]
    return [(title, [picture]) for title, picture in pictures if picture is not None]


def _one_a_run(key: str, figures: Mapping[str, _Draw]) -> list[Picture]:
    """A figure of each run, where it has it."""
    several = len(figures) > 1
    pictures = (
        _picture(name if several else "", f"{key}-{file_name(name.replace('/', '_'))}" if several else key, draw)
        for name, draw in figures.items()
    )
    return [picture for picture in pictures if picture is not None]


def _all_domains(groups: Groups) -> list[str]:
    return list(dict.fromkeys(domain for runs in groups.values() for run in runs for domain in domain_names(run)))


def _picture(title: str, name: str, draw: _Draw) -> Picture | None:
    light = draw(LIGHT)
    if light is None:
        return None
    return Picture(title, name, round(100 * light.get_figwidth()), light.drawn("png"), draw(DARK).drawn("png"), light)
