"""What the harness found, as an evaluation here: one line of eval.jsonl a task, with its subjects and categories."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_WITHOUT_FILTER = "none"


def with_bits(found: dict[str, Any]) -> dict[str, Any]:
    """What the harness found, with bits_per_byte among the metrics of tasks and groups, and without its samples."""
    samples = found.pop("samples")
    needed = {task: [bits for sample in some if (bits := bits_of(sample))] for task, some in samples.items()}
    for tables in (found["results"], found.get("groups", {})):
        for name, table in tables.items():
            some = [each for task in _tasks(name, found["group_subtasks"]) for each in needed.get(task, ())]
            if some and any("," in key for key in table):
                table[f"bits_per_byte,{_WITHOUT_FILTER}"] = sum(bits for bits, _ in some) / sum(
                    size for _, size in some
                )
    return found


def merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the harness found in several tasks as if they had been one call."""
    whole: dict[str, Any] = {}
    for each in found:
        for key, value in each.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    return whole


def evaluation(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A task's, group's or tag's results as an evaluator gives them.

    The metrics are the harness's, their standard errors NAME_stderr, with the name of a filter at the end; samples is
    the number of questions.

    Args:
        name: of what was asked.
        found: by the harness, of this or of more.
    """
    tables = {**found["results"], **found.get("groups", {})}
    members = found["group_subtasks"]
    groups = {}
    for each in (name, *_below(name, members)) if name in tables else tables:
        if metrics := _metrics(tables.get(each, {})):
            sizes = (found["n-samples"][task]["effective"] for task in _tasks(each, members))
            groups[each] = {**metrics, "samples": sum(sizes)}
    overall = groups.pop(name, None)
    return {"split": name, "domains": groups, "overall": overall}


def _metrics(table: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in table.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float):
            base = metric.removesuffix("_stderr")
            shown = base if kind == _WITHOUT_FILTER else f"{base}_{kind}"
            metrics[shown + metric[len(base) :]] = float(value)
    return metrics


def _below(name: str, members: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The groups and tasks that a group consists of, on all levels."""
    for member in members.get(name, ()):
        yield member
        yield from _below(member, members)


def _tasks(name: str, members: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The tasks that a group consists of; a task itself."""
    return (each for each in (name, *_below(name, members)) if each not in members)


def bits_of(sample: Mapping[str, Any]) -> tuple[float, int] | None:
    """(bits that the model needs for the right answer, bytes of it), or None where it is not one of several.

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
