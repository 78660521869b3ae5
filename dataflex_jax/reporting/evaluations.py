"""What eval.jsonl says: its splits, and how each metric of them is shown."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dataflex_jax.reporting.run_folder import RunRecords

# The split of the held-out loss; every other split is the name of an evaluator.
HELD_OUT = "valid"


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        key: its name in eval.jsonl.
        label: what people read, with the unit.
        number: the format of its values.
        best: min or max, whichever picks the best of several values; None where neither is known to.
    """

    key: str
    label: str
    number: str = "{:.4g}"
    best: Callable[[Iterable[float]], float] | None = None


_KNOWN = {
    metric.key: metric
    for metric in (
        Metric("nll", "nll [nats/token]", "{:.4f}", min),
        Metric("perplexity", "perplexity", "{:#.4g}", min),
        Metric("bits_per_byte", "bits/byte", "{:.4f}", min),
        Metric("accuracy", "accuracy", "{:.4f}", max),
        Metric("acc", "acc", "{:.4f}", max),
        Metric("acc_norm", "acc_norm", "{:.4f}", max),
        Metric("exact_match", "exact match", "{:.4f}", max),
        Metric("f1", "F1", "{:.4f}", max),
    )
}
_COUNTS = ("tokens", "samples")
_STDERR = "_stderr"


def metric_of(key: str) -> Metric:
    """How the metric of a name in eval.jsonl is shown."""
    return _KNOWN.get(key) or Metric(key, key)


def stderr_key(metric: Metric) -> str:
    """The name in eval.jsonl of the metric's standard error."""
    return metric.key + _STDERR


def splits(runs: Iterable[RunRecords]) -> list[str]:
    """The splits that the runs were evaluated on, in the order of their files."""
    return list(dict.fromkeys(str(record.get("split")) for run in runs for record in run.evals))


def evaluations(run: RunRecords, split: str = HELD_OUT) -> list[dict[str, Any]]:
    """A run's evaluations on one split, in the order of its file."""
    return [record for record in run.evals if str(record.get("split")) == split]


def shown_metrics(scores: Iterable[Mapping[str, float] | None]) -> list[Metric]:
    """The metrics among {name in eval.jsonl: value}, without counts and standard errors; the known ones first."""
    names = dict.fromkeys(name for values in scores for name in values or ())
    known = [metric for name, metric in _KNOWN.items() if name in names]
    hidden = {*_KNOWN, *_COUNTS}
    return known + [metric_of(name) for name in names if name not in hidden and not name.endswith(_STDERR)]
