"""What was found, for people and programs: a table, a picture, JSON and arrays."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_jax.files import replace_file, replace_json
from dataflex_jax.reporting.lds_plot import Scored, lds_figure
from dataflex_jax.validation.lds import LEVEL, Interval
from dataflex_jax.validation.study import Design, Found

RANDOM = "random"
_GROUPS_IN_TABLE = 8


def table(found: Found) -> str:
    """A line for each file of scores and one for random ones; with a few target groups, a column for each."""
    groups = found.groups if 1 < len(found.groups) <= _GROUPS_IN_TABLE else ()
    width = max(len(name) for name in (*found.lds, RANDOM, "scores"))
    widths = [max(len(group), 6) for group in groups]
    interval = f"{LEVEL:.0%} interval"
    head = [f"{'scores':{width}}", f"{'LDS':>7}", f"{interval:>18}", f"{'> random':>9}"]
    lines = [head + [f"{group:>{n}}" for group, n in zip(groups, widths, strict=True)]]
    for name, of_file in found.lds.items():
        cells = [f"{each.value:{n}.3f}" for each, n in zip(of_file.groups, widths, strict=False)] if groups else []
        lines.append([f"{name:{width}}", *_figures(of_file.overall), f"{of_file.above_random:9.1%}", *cells])
    lines.append([f"{RANDOM:{width}}", *_figures(found.by_chance)])
    return "\n".join(" ".join(line).rstrip() for line in lines)


def write(folder: Path, found: Found, design: Design) -> None:
    """Writes lds.json, lds.png and subsets.npz (`rows` [M, n], `losses` [M, groups], `groups`)."""
    replace_json(folder / "lds.json", _as_json(found, design), indent=1)
    picture, arrays = io.BytesIO(), io.BytesIO()
    scored = {name: Scored(of_file.overall, found.foretold[name]) for name, of_file in found.lds.items()}
    lds_figure(scored, found.by_chance, found.losses, found.groups).savefig(picture, format="png")
    replace_file(folder / "lds.png", picture.getvalue())
    np.savez(arrays, rows=found.members, losses=found.losses, groups=np.array(found.groups))
    replace_file(folder / "subsets.npz", arrays.getvalue())


def _figures(interval: Interval) -> list[str]:
    return [f"{interval.value:7.3f}", f"{f'[{interval.low:.3f}, {interval.high:.3f}]':>18}"]


def _as_json(found: Found, design: Design) -> dict[str, Any]:
    def figure(interval: Interval) -> dict[str, Any]:
        return {"lds": interval.value, "interval": [interval.low, interval.high]}

    return {
        "subsets": design.subsets,
        "alpha": design.alpha,
        "seeds": design.seeds,
        "candidates": found.num_rows,
        "rows_of_a_subset": found.members.shape[1],
        "level": LEVEL,
        "scores": {
            name: figure(of_file.overall)
            | {
                "above_random": of_file.above_random,
                "groups": {group: figure(g) for group, g in zip(found.groups, of_file.groups, strict=True)},
            }
            for name, of_file in found.lds.items()
        },
        "random": figure(found.by_chance),
        "losses": {group: of_group.tolist() for group, of_group in zip(found.groups, found.losses.T, strict=True)},
    }
