"""The two tables of a swarm: which mixture each run had, and what was measured of it; also those of other tools.

`ratios.csv` has a column for each domain, `metrics.csv` one for each metric; in both a column (`run`, `index`, `name`,
or one without a name) says which run a line is of. Several lines of metrics of one run are of several seeds.
"""

import csv
import fnmatch
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from dataflex_jax.errors import InputError, one_line, shown
from dataflex_jax.files import replace_file
from dataflex_jax.foreign import read_bytes

RATIOS, METRICS = "ratios.csv", "metrics.csv"
RUN, SEED = "run", "seed"
FEWEST = 8  # runs that a law may be fitted to
_NAMING = (RUN, "index", "name", "")  # columns that say which run a line is of
# What is fitted where nothing else is asked for: the first of these that some columns match.
_FITTED = ("bits_per_byte/target/*", "bits_per_byte/*", "*")


class Runs(NamedTuple):
    """The runs of a swarm.

    Attributes:
        names: of the S runs.
        domains: names of the K domains.
        weights: the mixture of each run, a distribution.
        metrics: names of the M metrics that a law is fitted to; less is better.
        values: of each run, the mean over its seeds.
        deviation: of each metric, the standard deviation over seeds, from all runs; None: a run has one seed.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    weights: Float64[np.ndarray, "S K"]
    metrics: tuple[str, ...]
    values: Float64[np.ndarray, "S M"]
    deviation: Float64[np.ndarray, " M"] | None


class _Table(NamedTuple):
    path: Path
    header: tuple[str, ...]
    lines: Sequence[tuple[int, Sequence[str]]]


def write(path: Path, header: Sequence[str], lines: Sequence[Sequence[str | int | float]]) -> None:
    """Writes a table; floats have all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    replace_file(path, text.getvalue().encode())


def write_metrics(
    folder: Path,
    runs: Sequence[str],
    seeds: Sequence[int],
    metrics: Sequence[str],
    values: Float64[np.ndarray, "S n M"],
) -> None:
    """Writes `metrics.csv`, a line for each run and seed."""
    lines = [
        [run, seed, *figures.tolist()]
        for run, of_run in zip(runs, values, strict=True)
        for seed, figures in zip(seeds, of_run, strict=True)
    ]
    write(folder / METRICS, [RUN, SEED, *metrics], lines)


def read(ratios: Path, metrics: Path, fitted: str | None = None) -> Runs:
    """The runs that two tables hold.

    Args:
        ratios: the file of mixtures; weights of any scale.
        metrics: the file of metrics.
        fitted: a pattern of the metrics' names, such as "bits_per_byte/*"; None: bits per byte of the target groups, of
            the domains where there are none of these, and of other tools' tables all columns.

    Raises:
        InputError: files that cannot be read, or that do not fit together; in one line.
    """
    mixtures, measured = _opened(ratios), _opened(metrics)
    naming = next((name for name in _NAMING if name in mixtures.header and name in measured.header), None)
    if naming is None:
        raise InputError(f"{metrics}: no column run, index or name that says which run of {ratios} a line is of")
    domains = tuple(name for name in mixtures.header if name not in _NAMING)
    if len(domains) < 2:
        raise InputError(f"{ratios}: {len(domains)} columns of domains; a mixture has two or more")
    columns = [name for name in measured.header if name not in (*_NAMING, SEED)]
    names = matching(columns, fitted, f"column of {metrics}")
    by_run = _by_run(mixtures, naming, domains)
    if twice := [run for run, found in by_run.items() if len(found) > 1]:
        raise InputError(f"{ratios}: two lines of run {twice[0]!r}")
    figures = _by_run(measured, naming, names)
    for one, other, path in ((by_run, figures, metrics), (figures, by_run, ratios)):
        if missing := [run for run in one if run not in other]:
            raise InputError(f"{path}: no line of run {missing[0]!r}, which the other table has")
    if len(by_run) < FEWEST:
        raise InputError(f"{ratios}: {len(by_run)} runs; {FEWEST} or more are needed for a law")
    weights = np.stack([_distribution(ratios, run, found[0]) for run, found in by_run.items()])
    values = np.stack([figures[run].mean(axis=0) for run in by_run])
    return Runs(tuple(by_run), domains, weights, names, values, _deviation(figures))


def matching(columns: Sequence[str], fitted: str | None, what: str = "metric") -> tuple[str, ...]:
    """The metrics that a law is fitted to, or that models are compared by.

    Args:
        columns: names of all metrics.
        fitted: as in `read`.
        what: a column is, for the message.

    Raises:
        InputError: there is none.
    """
    for pattern in _FITTED if fitted is None else (fitted,):
        if found := tuple(fnmatch.filter(columns, pattern)):
            return found
    raise InputError(f"no {what}; it has {shown(', '.join(columns))}", option="--fit", value=fitted)


def _distribution(path: Path, run: str, weights: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    if (weights < 0).any() or weights.sum() <= 0:
        raise InputError(f"{path}: run {run!r}: the weights of a mixture are 0 or more, and not all 0")
    return weights / weights.sum()


def _deviation(figures: Mapping[str, Float64[np.ndarray, "n M"]]) -> Float64[np.ndarray, " M"] | None:
    several = [found for found in figures.values() if len(found) > 1]
    if not several:
        return None
    squares = sum(((found - found.mean(axis=0)) ** 2).sum(axis=0) for found in several)
    return np.sqrt(squares / sum(len(found) - 1 for found in several))


def _by_run(table: _Table, naming: str, columns: Sequence[str]) -> dict[str, Float64[np.ndarray, "n C"]]:
    """The numbers of each run's lines."""
    place, places = table.header.index(naming), [table.header.index(name) for name in columns]
    found: dict[str, list[list[float]]] = {}
    for number, line in table.lines:
        numbers = [_number(table.path, number, table.header[at], line[at]) for at in places]
        found.setdefault(line[place].strip(), []).append(numbers)
    return {run: np.array(numbers) for run, numbers in found.items()}


def _number(path: Path, line: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{path}:{line}: column {column!r}: {shown(cell, 40)} is not a finite number")
    return value


def _opened(path: Path) -> _Table:
    contents = read_bytes(path, "a .csv table")
    try:
        lines = list(csv.reader(io.StringIO(contents.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a .csv table in UTF-8 ({one_line(error)})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if not numbered:
        raise InputError(f"{path}: nothing in it; a header and one line a run are expected")
    header = tuple(name.strip() for name in numbered[0][1])
    if twice := [name for name in header if header.count(name) > 1]:
        raise InputError(f"{path}: two columns are called {twice[0]!r}")
    for number, line in numbered[1:]:
        if len(line) != len(header):
            raise InputError(f"{path}:{number}: {len(line)} columns; the header has {len(header)}")
    return _Table(path, header, numbered[1:])
