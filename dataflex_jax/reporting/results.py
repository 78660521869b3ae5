"""The results of groups of runs: what each reached, and how it differs from the first group, with how sure that is."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dataflex_jax.reporting.bands import Groups
from dataflex_jax.reporting.evaluations import HELD_OUT, Metric, evaluations, metric_of, shown_metrics, splits
from dataflex_jax.reporting.groups import are_single, by_seed, flat_config
from dataflex_jax.reporting.intervals import Difference, difference, spread
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.table import MISSING, Cell, Table, text_of

SPREAD_AND_BEST = (
    "Mean ± standard deviation over a group's runs, of each run's last evaluation. Bold is what is better than every "
    "other group with a 95 % interval of the difference that leaves out 0."
)
OVERALL, AVERAGE, WORST, DOMAIN = "overall", "average domain", "worst domain", "domain"


class Quantity(NamedTuple):
    """A figure that a run has.

    Attributes:
        split: whose evaluations it is of, `HELD_OUT` or the name of an evaluator.
        kind: `OVERALL`, `AVERAGE`, `WORST` or `DOMAIN`; of other evaluators `OVERALL`.
        name: what people read, of `DOMAIN` the domain's.
        metric: how it is shown.
    """

    split: str
    kind: str
    name: str
    metric: Metric


Samples = Mapping[str, Mapping[Hashable, float]]


def tokenizers(runs: Sequence[RunRecords]) -> set[str]:
    """The tokenizers of the runs: of several, figures per token are not to be compared."""
    return {text_of(flat_config(run).get("data.tokenizer")) for run in runs}


def spread_text(values: Sequence[float], number: str, of: int | None = None) -> str:
    """The mean and the standard deviation of values; how many there are where that is not `of`."""
    if not values:
        return MISSING
    mean, sd = spread(np.array(values, np.float64))
    text = text_of(mean if sd is not None else values[0], number)
    if sd is not None:
        # Of figures that are shown by their digits two of the spread are enough.
        text += f" ± {text_of(sd, number if number.endswith('f}') else '{:.2g}')}"
    return text if of in (None, len(values)) else f"{text} (n = {len(values)})"


def quantities(groups: Groups) -> dict[Quantity, Samples]:
    """The figures of every run's last evaluations: {quantity: {group: {seed: value}}}.

    Held-out loss overall, of the average and of the worst domain, and of each domain; what other evaluators found
    overall. Of runs with other domains, overall, average and worst are other quantities and left out; with other
    tokenizers the loss is in bits/byte.
    """
    runs = [run for of_group in groups.values() for run in of_group]
    metric = metric_of("nll" if len(tokenizers(runs)) < 2 else "bits_per_byte")
    last = [_last(run, HELD_OUT).get("domains") or {} for run in runs]
    domains = dict.fromkeys(name for of_run in last for name in of_run)
    comparable = len({frozenset(of_run) for of_run in last if of_run}) == 1
    wanted = [Quantity(HELD_OUT, kind, kind, metric) for kind in (OVERALL, AVERAGE, WORST) if comparable]
    wanted += [Quantity(HELD_OUT, DOMAIN, name, metric) for name in domains]
    for split in splits(runs):
        if split != HELD_OUT:
            found = shown_metrics(_last(run, split).get("overall") for run in runs)
            wanted += [Quantity(split, OVERALL, f"{split}: {each.label}", each) for each in found]
    samples = {
        quantity: {name: by_seed(runs, [figure(run, quantity) for run in runs]) for name, runs in groups.items()}
        for quantity in wanted
    }
    return {quantity: values for quantity, values in samples.items() if any(values.values())}


def figure(run: RunRecords, quantity: Quantity) -> float | None:
    """What a run's last evaluation says of a quantity; None: nothing."""
    key, record = quantity.metric.key, _last(run, quantity.split)
    if quantity.kind == OVERALL:
        return (record.get("overall") or {}).get(key)
    domains = {name: scores.get(key) for name, scores in (record.get("domains") or {}).items()}
    if quantity.kind == DOMAIN:
        return domains.get(quantity.name)
    known = [value for value in domains.values() if value is not None]
    if not known:
        return None
    return float(np.mean(known)) if quantity.kind == AVERAGE else max(known)


def winner(samples: Samples, metric: Metric) -> str | None:
    """The group whose mean is the best, where the intervals of its differences to all others leave out 0."""
    known = {name: values for name, values in samples.items() if values}
    if metric.best is None or len(known) < 2:
        return None
    means = {name: float(np.mean(list(values.values()))) for name, values in known.items()}
    best = metric.best(means.values())
    name = next(name for name, mean in means.items() if mean == best)
    others = (difference(known[name], values) for other, values in known.items() if other != name)
    return name if all(_better(found, metric) == 1 for found in others) else None


def results_table(groups: Groups) -> Table | None:
    """A line a group: how many runs, and mean and spread of what they reached; None for single runs."""
    found = {quantity: s for quantity, s in quantities(groups).items() if quantity.kind != DOMAIN}
    if are_single(groups) or not found:
        return None
    best = {quantity: winner(samples, quantity.metric) for quantity, samples in found.items()}
    rows = []
    for name, runs in groups.items():
        cells = [
            Cell(spread_text(list(samples[name].values()), quantity.metric.number, len(runs)), best[quantity] == name)
            for quantity, samples in found.items()
        ]
        rows.append((name, [Cell(str(len(runs))), *cells]))
    held_out = [quantity for quantity in found if quantity.split == HELD_OUT]
    spans = [("", 1)]
    if held_out:
        spans.append((f"held-out {held_out[0].metric.label}", len(held_out)))
    if len(found) > len(held_out):
        spans.append(("", len(found) - len(held_out)))
    return Table(
        "Results",
        ["runs", *(quantity.name for quantity in found)],
        rows,
        "group",
        spans=spans,
        notes=[SPREAD_AND_BEST, *steps_note(groups)],
    )


def steps_note(groups: Groups) -> list[str]:
    """Says, where it is so, that the last evaluations were not at the same step."""
    steps = {name: sorted({_last(run, HELD_OUT).get("step", 0) for run in runs}) for name, runs in groups.items()}
    if len({step for of_group in steps.values() for step in of_group}) < 2:
        return []
    told = "; ".join(f"{name}: {', '.join(map(str, of_group))}" for name, of_group in steps.items())
    return [f"The last evaluations were not at the same step ({told}), so that groups and seeds are not alike."]


def difference_table(groups: Groups) -> Table | None:
    """How each group differs from the first one, with 95 % intervals; None for single runs and for one group."""
    if are_single(groups) or len(groups) < 2:
        return None
    base, *others = groups
    rows: list[tuple[str, list[Cell]]] = []
    kinds: dict[str, dict[str, None]] = {name: {} for name in others}
    found = quantities(groups)
    for quantity, samples in found.items():
        cells = []
        for name in others:
            if samples[base] and samples[name]:
                change = difference(samples[name], samples[base])
                kinds[name][_kind(change, len(samples[name]), len(samples[base]))] = None
                cells.append(_difference_cell(change, quantity.metric))
            else:
                cells.append(Cell(MISSING))
        rows.append((quantity.name, cells))
    if not rows:
        return None
    first = next(iter(found))
    intervals = [Cell("; ".join(kinds[name]) or MISSING) for name in others]
    return Table(
        f"Differences to {base}",
        others,
        [*rows, ("interval", intervals)],
        f"held-out {first.metric.label}" if first.split == HELD_OUT else "",
        last=1,
        notes=[
            "Difference of the means, with its 95 % interval: Student's of the differences by seed where two seeds or "
            "more are in both groups, else Welch's. Bold where the interval leaves out 0 and the group is better. Each "
            "interval is for itself: of twenty, one leaves out the truth by chance.",
            *steps_note(groups),
        ],
    )


def _last(run: RunRecords, split: str) -> Mapping:
    return next(reversed(evaluations(run, split)), {})


def _kind(found: Difference, ours: int, theirs: int) -> str:
    if found.pairs:
        return f"paired, n = {found.pairs}"
    return f"none, n = {ours} and {theirs}" if found.low is None else f"Welch, n = {ours} and {theirs}"


def _difference_cell(found: Difference, metric: Metric) -> Cell:
    number = metric.number.replace("{:", "{:+")
    text = text_of(found.mean, number)
    if found.low is not None:
        text += f" [{text_of(found.low, number)}, {text_of(found.high, number)}]"
    better = _better(found, metric)
    return Cell(text, best=better == 1, worse=better == -1)


def _better(found: Difference, metric: Metric) -> int:
    """1 or -1 where a difference is for the better or the worse beyond chance, and is not shown as 0; otherwise 0."""
    if float(metric.number.format(found.mean)) == 0:
        return 0
    return found.sign * {max: 1, min: -1}.get(metric.best, 0)
