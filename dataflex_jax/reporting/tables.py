"""The tables of the page: how far the runs came, how their configurations differ, and how they were evaluated.

A column is a group of runs, of which it shows the mean and the spread, or one run.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from dataflex_jax.reporting.bands import Groups
from dataflex_jax.reporting.evaluations import HELD_OUT, Metric, evaluations, shown_metrics, splits, stderr_key
from dataflex_jax.reporting.groups import are_single, by_seed, flat_config
from dataflex_jax.reporting.results import spread_text, tokenizers, winner
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.table import Cell, Table, text_of
from dataflex_jax.reporting.trackers import flatten

# What a reader asks of a run first, as far as its configuration has it.
_HIGHLIGHTS = (
    "mixer.name",
    "selector.name",
    "order.name",
    "weighter.name",
    "model.name_or_path",
    "model.architecture",
    "model.hidden_size",
    "model.num_hidden_layers",
    "lora.rank",
    "data.source",
    "data.seq_len",
    "data.cutoff_len",
    "data.batch_size",
    "train_step",
    "optim.learning_rate",
    "optim.schedule",
    "seed",
)


def overview(groups: Groups) -> Table | None:
    """How far each run came and how fast it was; None where no run says it."""

    def last(field: str) -> Callable[[RunRecords], Any]:
        return lambda r: next((m[field] for m in reversed(r.metrics) if m.get(field) is not None), None)

    def median(field: str, factor: float = 1.0) -> Callable[[RunRecords], float | None]:
        def of(r: RunRecords) -> float | None:
            known = [m[field] for m in r.metrics if m.get(field) is not None]
            return factor * float(np.median(known)) if known else None

        return of

    figures: tuple[tuple[str, Callable[[RunRecords], Any], str], ...] = (
        ("last step", last("step"), ""),
        ("tokens seen", last("tokens_seen"), ""),
        ("last training loss", last("loss"), "{:.4f}"),
        ("tokens/s, median", median("tokens_per_second"), "{:,.0f}"),
        ("MFU [%], median", median("mfu", 100.0), "{:.1f}"),
        ("hours", hours, "{:.2f}"),
    )
    rows = []
    for head, value, number in figures:
        known = {name: [v for v in map(value, runs) if v is not None] for name, runs in groups.items()}
        if any(known.values()):
            # Of steps and tokens there is no spread.
            cells = [spread_text(v, number) if number else text_of(sorted(set(v))) for v in known.values()]
            rows.append((head, list(map(Cell, cells))))
    if not rows:
        return None
    if not are_single(groups):
        rows.insert(0, ("runs", [Cell(str(len(runs))) for runs in groups.values()]))
    timed = rows[-1][0] == "hours"
    notes = ["Hours: from the first line of times.jsonl to the last, interruptions included."] if timed else []
    return Table("Runs" if len(groups) > 1 else "Run", list(groups), rows, notes=notes)


def hours(run: RunRecords) -> float | None:
    """From the first logged step to the last; None of less than two."""
    if len(run.times) < 2:
        return None
    begun, ended = (datetime.fromisoformat(run.times[end]["time"]) for end in (0, -1))
    return (ended - begun).total_seconds() / 3600


def differences(groups: Groups) -> Table | None:
    """The configuration where the runs do not agree, of a group all values; None where they agree."""
    configs = {name: [flat_config(run) for run in runs] for name, runs in groups.items()}
    every = [config for of_group in configs.values() for config in of_group]
    names = dict.fromkeys(name for config in every for name in config)
    differing = [n for n in names if any(c.get(n) != every[0].get(n) for c in every[1:])]

    def cell(of_group: Sequence[Mapping[str, Any]], name: str) -> Cell:
        return Cell(", ".join(dict.fromkeys(text_of(config.get(name)) for config in of_group)))

    rows = [(name, [cell(of_group, name) for of_group in configs.values()]) for name in differing]
    return Table("What differs", list(groups), rows, words=True) if rows else None


def highlights(runs: Sequence[RunRecords]) -> list[tuple[str, str]]:
    """The highlights that all runs share; those that differ stand in the table of differences."""
    configs = list(map(flat_config, runs))
    unused = {_unused_length(config) for config in configs}
    shared = [n for n in _HIGHLIGHTS if n not in unused and all(c.get(n) == configs[0].get(n) for c in configs)]
    return [(name, text_of(configs[0][name])) for name in shared if configs[0].get(name) is not None]


def _unused_length(config: Mapping[str, Any]) -> str:
    """The one of the two fields of a row's length that a run's data have no use for."""
    examples = config.get("data.formatting") is not None or config.get("data.source") == "dataset_info"
    return "data.seq_len" if examples else "data.cutoff_len"


def _repetitions(groups: Groups) -> list[str]:
    """The names of the single runs that differ from another one in nothing but the seed."""
    single = {name: runs[0] for name, runs in groups.items() if len(runs) == 1}
    configs = {name: run.config["config"] for name, run in single.items() if isinstance(run.config.get("config"), dict)}

    def repeats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one != other and {**one, "seed": None} == {**other, "seed": None}

    return [name for name, config in configs.items() if any(repeats(config, other) for other in configs.values())]


def evaluation_tables(groups: Groups) -> list[Table]:
    """For each split that the runs were evaluated on, the last evaluation of every run: rows of domains, and a span of
    columns a metric."""
    tables = (_evaluation_table(groups, split) for split in splits(run for runs in groups.values() for run in runs))
    return [table for table in tables if table.columns]


def _evaluation_table(groups: Groups, split: str) -> Table:
    last = {name: [next(reversed(evaluations(run, split)), {}) for run in runs] for name, runs in groups.items()}
    per_domain = {name: [record.get("domains") or {} for record in records] for name, records in last.items()}
    overall = {name: [record.get("overall") or {} for record in records] for name, records in last.items()}
    every = [scores for of_group in per_domain.values() for scores in of_group]
    totals = [scores for of_group in overall.values() for scores in of_group]
    metrics = shown_metrics([*(scores for of_run in every for scores in of_run.values()), *totals])
    domains = list(dict.fromkeys(name for scores in every for name in scores))
    # An overall figure over other domains is another quantity: no run is the best of it.
    same_domains = len({frozenset(d) for d, figures in zip(every, totals, strict=True) if figures}) == 1
    repeated = _repetitions(groups)
    compared = len(repeated) < len(groups)

    def row(scores: Mapping[str, Sequence[Mapping[str, float]]], comparable: bool = True) -> list[Cell]:
        return [cell for metric in metrics for cell in _scores(groups, scores, metric, comparable and compared)]

    rows = [(d, row({name: [s.get(d) or {} for s in runs] for name, runs in per_domain.items()})) for d in domains]
    if any(totals):
        rows.append(("overall", row(overall, same_domains)))
    several, labels = len(groups) > 1, [metric.label for metric in metrics]
    return Table(
        f"Held out: {split}",
        [name for _ in labels for name in groups] if several else labels,
        rows,
        "domain" if split == HELD_OUT else "group",
        spans=[(label, len(groups)) for label in labels] if several else (),
        last=int(any(totals)),
        notes=_notes(groups, last, metrics, repeated),
    )


def _notes(
    groups: Groups, last: Mapping[str, Sequence[Mapping]], metrics: Sequence[Metric], repeated: Sequence[str]
) -> list[str]:
    every, several, notes = [run for runs in groups.values() for run in runs], len(groups) > 1, []
    if len(tokenizers(every)) > 1 and "nll" in {metric.key for metric in metrics}:
        notes.append(
            "The runs have different tokenizers: compare bits/byte, not nll and perplexity, which are per token."
        )
    if repeated:
        named = ", ".join(repeated)
        notes.append(f"{named} differ in the seed alone: their spread is chance, and so are smaller differences.")
    steps = {name: text_of(sorted({r["step"] for r in records if "step" in r})) for name, records in last.items()}
    told = [f"{name}: {step}" if several else step for name, step in steps.items()]
    notes.append(f"Last evaluation, at step {', '.join(told)}.")
    if several and len(repeated) < len(groups) and any(metric.best for metric in metrics):
        notes.append("The best of each row is bold." if are_single(groups) else "Spreads and bold as under Results.")
    return notes


def _scores(
    groups: Groups, scores: Mapping[str, Sequence[Mapping[str, float]]], metric: Metric, compare: bool
) -> list[Cell]:
    """One row's values of a metric. With `compare` the best of several is marked: of single runs all that print like
    it, of groups the one that is better than all others beyond chance."""
    values = {name: [s.get(metric.key) for s in runs] for name, runs in scores.items()}
    if not are_single(groups):
        samples = {name: by_seed(groups[name], v) for name, v in values.items()}
        best = winner(samples, metric) if compare else None
        return [
            Cell(spread_text(list(of_group.values()), metric.number, len(groups[name])), best=name == best)
            for name, of_group in samples.items()
        ]
    known = [value for (value,) in values.values() if value is not None]
    best = text_of(metric.best(known), metric.number) if compare and metric.best and len(known) > 1 else None
    cells = []
    for name, (value,) in values.items():
        text, stderr = text_of(value, metric.number), scores[name][0].get(stderr_key(metric))
        error = "" if value is None or stderr is None else f" ± {text_of(stderr, metric.number)}"
        cells.append(Cell(text + error, best=text == best))
    return cells


def config_tables(runs: Mapping[str, RunRecords]) -> list[tuple[str, dict[str, str]]]:
    """Each run's whole configuration."""
    return [(name, {key: text_of(value) for key, value in flat_config(run).items()}) for name, run in runs.items()]


def summary_table(runs: Mapping[str, RunRecords]) -> Table | None:
    """What summary.json says of each run."""
    summaries = [flatten(run.summary) for run in runs.values()]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    rows = [(name, [Cell(text_of(summary.get(name))) for summary in summaries]) for name in names]
    return Table("summary.json", list(runs), rows, words=True) if rows else None
