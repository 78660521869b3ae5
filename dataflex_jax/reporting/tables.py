"""The tables of the page: how far the runs came, how their configurations differ, and how they were evaluated."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex_jax.reporting.evaluations import HELD_OUT, Metric, evaluations, shown_metrics, splits, stderr_key
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.trackers import flatten

_MISSING = "—"
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


@dataclass(frozen=True)
class Cell:
    """One table cell; `best` marks the best of a row."""

    text: str
    best: bool = False


def _text(value: Any, number: str = "{:.6g}") -> str:
    if value is None:
        return _MISSING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        # "{:#.4g}" leaves the dot of "3863." there.
        return number.format(value).removesuffix(".") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or _MISSING
    return str(value)


def overview(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Cell]]]:
    """How far each run came and how fast it was."""

    def last(field: str) -> Callable[[RunRecords], Any]:
        return lambda r: next((m[field] for m in reversed(r.metrics) if m.get(field) is not None), None)

    def median(field: str) -> Callable[[RunRecords], float | None]:
        def of(r: RunRecords) -> float | None:
            known = [m[field] for m in r.metrics if m.get(field) is not None]
            return float(np.median(known)) if known else None

        return of

    def percent(r: RunRecords) -> str | None:
        mfu = median("mfu")(r)
        return None if mfu is None else f"{100 * mfu:.1f} %"

    rows: tuple[tuple[str, Callable[[RunRecords], Any], str], ...] = (
        ("last step", last("step"), ""),
        ("tokens seen", last("tokens_seen"), ""),
        ("last training loss", last("loss"), "{:.4f}"),
        ("tokens/s, median", median("tokens_per_second"), "{:,.0f}"),
        ("MFU, median", percent, ""),
    )
    table = [(label, [Cell(_text(value(r), number)) for r in runs.values()]) for label, value, number in rows]
    return [(label, cells) for label, cells in table if any(cell.text != _MISSING for cell in cells)]


def _config(run: RunRecords) -> dict[str, Any]:
    """The resolved configuration, flat, with dots; versions and device as they stand in config.json."""
    flat = flatten(run.config)
    return {name.removeprefix("config/").replace("/", "."): value for name, value in flat.items()}


def _config_rows(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    return [(name, [Cell(_text(config.get(name))) for config in configs]) for name in names]


def differences(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Cell]]]:
    """The configuration where the runs do not agree."""
    configs = [_config(run) for run in runs.values()]
    names = list(dict.fromkeys(name for config in configs for name in config))
    return _config_rows(configs, [n for n in names if any(c.get(n) != configs[0].get(n) for c in configs[1:])])


def highlights(runs: Mapping[str, RunRecords]) -> list[tuple[str, str]]:
    """The highlights that all runs share; those that differ stand in the table of differences."""
    configs = [_config(run) for run in runs.values()]
    unused = {_unused_length(config) for config in configs}
    shared = [n for n in _HIGHLIGHTS if n not in unused and all(c.get(n) == configs[0].get(n) for c in configs)]
    return [(name, _text(configs[0][name])) for name in shared if configs[0].get(name) is not None]


def _unused_length(config: Mapping[str, Any]) -> str:
    """The one of the two fields of a row's length that a run's data have no use for."""
    examples = config.get("data.formatting") is not None or config.get("data.source") == "dataset_info"
    return "data.seq_len" if examples else "data.cutoff_len"


def _repetitions(runs: Mapping[str, RunRecords]) -> list[str]:
    """The names of the runs that differ from another one in nothing but the seed."""
    configs = {name: run.config["config"] for name, run in runs.items() if isinstance(run.config.get("config"), dict)}

    def repeats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one != other and {**one, "seed": None} == {**other, "seed": None}

    return [name for name, config in configs.items() if any(repeats(config, other) for other in configs.values())]


@dataclass(frozen=True)
class EvaluationTable:
    """The last evaluation of every run on one split: rows of domains, a group of columns a metric.

    Attributes:
        split: whose evaluations they are.
        domain: what a row is.
        groups: the metrics' labels.
        steps: of each run's evaluation.
        rows: each domain's cells, metric by metric and run by run.
        overall: the same over all domains; None where no run has it.
        marked: whether the best of a row is known of any metric.
        note: what to mind in comparing.
    """

    split: str
    domain: str
    groups: list[str]
    steps: list[str]
    rows: list[tuple[str, list[Cell]]]
    overall: list[Cell] | None
    marked: bool
    note: str


def evaluation_tables(runs: Mapping[str, RunRecords]) -> list[EvaluationTable]:
    """A table for each split that the runs were evaluated on."""
    tables = [_evaluation_table(runs, split) for split in splits(runs.values())]
    return [table for table in tables if table.groups]


def _evaluation_table(runs: Mapping[str, RunRecords], split: str) -> EvaluationTable:
    last = [next(reversed(evaluations(run, split)), {}) for run in runs.values()]
    per_domain = [record.get("domains") or {} for record in last]
    overall = [record.get("overall") or {} for record in last]
    metrics = shown_metrics([*(scores for of_run in per_domain for scores in of_run.values()), *overall])
    domains = list(dict.fromkeys(name for scores in per_domain for name in scores))
    # An overall figure over other domains is another quantity: no run is the best of it.
    same_domains = len({frozenset(d) for d, figures in zip(per_domain, overall, strict=True) if figures}) == 1
    repeated = _repetitions(runs)
    compared = len(repeated) < len(runs)

    def row(scores: Sequence[Mapping[str, float]], comparable: bool = True) -> list[Cell]:
        return [cell for metric in metrics for cell in _scores(scores, metric, comparable and compared)]

    return EvaluationTable(
        split=split,
        domain="domain" if split == HELD_OUT else "group",
        groups=[metric.label for metric in metrics],
        steps=[_text(record.get("step")) for record in last],
        rows=[(name, row([scores.get(name) or {} for scores in per_domain])) for name in domains],
        overall=row(overall, same_domains) if any(overall) else None,
        marked=compared and any(metric.best for metric in metrics),
        note=" ".join(
            filter(None, (_tokenizers_note(runs) if "nll" in {m.key for m in metrics} else "", _seeds_note(repeated)))
        ),
    )


def _scores(scores: Sequence[Mapping[str, float]], metric: Metric, compare: bool) -> list[Cell]:
    """One row's values of a metric; with `compare` the best of several is marked, all that print like it."""
    values = [of_run.get(metric.key) for of_run in scores]
    known = [value for value in values if value is not None]
    best = _text(metric.best(known), metric.number) if compare and metric.best and len(known) > 1 else None
    cells = []
    for of_run, value in zip(scores, values, strict=True):
        text, stderr = _text(value, metric.number), of_run.get(stderr_key(metric))
        error = "" if value is None or stderr is None else f" ± {_text(stderr, metric.number)}"
        cells.append(Cell(text + error, best=text == best))
    return cells


def _tokenizers_note(runs: Mapping[str, RunRecords]) -> str:
    tokenizers = {_text(_config(run).get("data.tokenizer")) for run in runs.values()}
    if len(tokenizers) > 1:
        return "The runs have different tokenizers: compare bits/byte, not nll and perplexity, which are per token."
    return ""


def _seeds_note(repeated: Sequence[str]) -> str:
    if not repeated:
        return ""
    return f"{', '.join(repeated)} differ in the seed alone: their spread is chance, and so are smaller differences."


def config_tables(runs: Mapping[str, RunRecords]) -> list[tuple[str, dict[str, str]]]:
    """Each run's whole configuration."""
    return [(name, {key: _text(value) for key, value in _config(run).items()}) for name, run in runs.items()]


def summary_table(runs: Mapping[str, RunRecords]) -> list[tuple[str, list[Cell]]]:
    """What summary.json says of each run."""
    summaries = [flatten(run.summary) for run in runs.values()]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    return [(name, [Cell(_text(summary.get(name))) for summary in summaries]) for name in names]
