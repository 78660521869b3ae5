"""What the harness found, as an evaluation here: one line of eval.jsonl a task, with its subjects and categories."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_WITHOUT_FILTER = "none"


def evaluation(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """A task's, group's or tag's results as an evaluator gives them.

    The metrics are the harness's, their standard errors NAME_stderr; samples is the number of questions. Where the right
    answer is one of several, bits_per_byte is the bits that the model needs for it, a byte of its UTF-8 text: it moves
    before the accuracy of a small model does.

    Args:
        name: of what was asked.
        results: as the harness gives them, with its samples.
    """
    tables = {**results["results"], **results.get("groups", {})}
    groups = {group: metrics for group in tables if (metrics := _metrics(group, results, tables[group]))}
    overall = groups.pop(name, None)
    return {"split": name, "domains": groups, "overall": overall}


def _metrics(name: str, results: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in table.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float) and not isinstance(value, bool):
            base = metric.removesuffix("_stderr")
            shown = base if kind == _WITHOUT_FILTER else f"{base}_{kind}"
            metrics[shown + metric[len(base) :]] = float(value)
    if not metrics:
        return {}
    tasks = list(_tasks(name, results["group_subtasks"]))
    needed = [bits_of(sample) for task in tasks for sample in results["samples"].get(task, ())]
    needed = [each for each in needed if each is not None]
    if needed:
        metrics["bits_per_byte"] = sum(bits for bits, _ in needed) / sum(size for _, size in needed)
    metrics["samples"] = sum(results["n-samples"][task]["effective"] for task in tasks)
    return metrics


def _tasks(name: str, members: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The tasks that a group consists of; a task itself."""
    if name not in members:
        yield name
    for member in members.get(name, ()):
        yield from _tasks(member, members)


def bits_of(sample: Mapping[str, Any]) -> tuple[float, int] | None:
    """(bits that the model needs for the right answer, bytes of it); None: the question has no choices, or no right one.

    Args:
        sample: a question as the harness logs it, of any filter.
    """
    right, asked = sample["target"], sample["arguments"]
    answers = [response[0] for response in sample["resps"]]
    if not isinstance(right, int) or not 0 <= right < len(asked) or len(asked) < 2:
        return None
    if not all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers):
        return None
    return -float(answers[right][0]) / math.log(2), len(asked[right][1].encode())


def table(record: Mapping[str, Any]) -> str:
    """An evaluation as text: a line a subject and a category, each metric with its standard error."""
    groups = {**record["domains"], **({record["split"]: record["overall"]} if record["overall"] else {})}
    metrics = list(dict.fromkeys(key for figures in groups.values() for key in figures if not key.endswith("_stderr")))
    rows = [
        ["task", *metrics],
        *([name, *(_shown(figures, key) for key in metrics)] for name, figures in groups.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _shown(figures: Mapping[str, float], key: str) -> str:
    if key not in figures:
        return ""
    value, error = figures[key], figures.get(f"{key}_stderr")
    if key == "samples":
        return str(int(value))
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
