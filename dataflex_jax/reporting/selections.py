"""What a run's selections/ say: rows, scores and lengths of each choice, and what was scored highest and lowest."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataflex_jax.errors import InputError
from dataflex_jax.json_lines import read_jsonl
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.table import MISSING, Cell, Table, text_of

_NAME = re.compile(r"step_(\d+)\.npz")
# Of many choices evenly spaced ones are shown.
_MOST_LINES = 12
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Selection(NamedTuple):
    """One choice.

    Attributes:
        step: steps done before it.
        ids: int [n], places in the pool.
        scores: float [n], theirs.
        all_scores: float [N], NaN where there is none; None where they were not kept.
        lengths: int [n], inputs of the chosen; None of earlier versions' runs.
        pool_lengths: int [L], the lengths that candidates have; None of earlier versions' runs.
        pool_rows: int [L], how many candidates have each; None of earlier versions' runs.
    """

    step: int
    ids: np.ndarray
    scores: np.ndarray
    all_scores: np.ndarray | None
    lengths: np.ndarray | None
    pool_lengths: np.ndarray | None
    pool_rows: np.ndarray | None


def selection_paths(run: RunRecords, most: int) -> list[Path]:
    """The files of a run's choices by step; of more than `most`, evenly spaced ones with the first and the last."""
    folder = run.folder / "selections"
    paths = sorted(path for path in folder.glob("step_*.npz") if _NAME.fullmatch(path.name))
    places = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    return [paths[place] for place in places]


def read_selection(path: Path) -> Selection:
    """A choice from its file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read; the .npz file that a run writes there is expected") from error
    step = int(_NAME.fullmatch(path.name)[1])
    found = Selection(step, *(arrays.get(name) for name in Selection._fields[1:]))
    if not _is_sound(found):
        raise InputError(f"{path}: not a selection; arrays `ids` and `scores` of numbers and one length are expected")
    return found


def _is_sound(found: Selection) -> bool:
    """Whether what must be there is, in numbers, and what belongs together has one length."""
    if found.ids is None or found.scores is None:
        return False
    given = [array for array in found[1:] if array is not None]
    if any(array.ndim != 1 or array.dtype.kind not in "iuf" or len(array) == 0 for array in given):
        return False
    lengths = [None if array is None else len(array) for array in found[1:]]
    ids, scores, _, of_chosen, sizes, rows = lengths
    return ids == scores and of_chosen in (None, ids) and sizes == rows and (of_chosen is None) == (sizes is None)


def selections_table(run: RunRecords) -> Table | None:
    """A line a choice: how many rows and how long, coverage, overlap and scores; None of a run without choices."""
    lines = {record["step"]: record for record in run.policy if record.get("coverage") is not None}
    rows = []
    for path in selection_paths(run, _MOST_LINES):
        chosen = read_selection(path)
        line = lines.get(chosen.step, {})
        cells = [
            text_of(len(chosen.ids)),
            text_of(len(np.unique(chosen.ids))),
            _percent(line.get("coverage")),
            _percent(line.get("overlap")),
            MISSING if chosen.lengths is None else f"{chosen.lengths.mean():.1f}",
            MISSING if chosen.lengths is None else f"{_pool_mean(chosen):.1f}",
            *(f"{value:.4g}" for value in (chosen.scores.min(), chosen.scores.mean(dtype=float), chosen.scores.max())),
        ]
        rows.append((str(chosen.step), list(map(Cell, cells))))
    columns = ["rows", "distinct", "coverage", "chosen again", "chosen", "candidates", "lowest", "mean", "highest"]
    spans = (("", 4), ("mean length", 2), ("score", 3))
    return Table("Selections", columns, rows, "step", spans) if rows else None


def examples_table(run: RunRecords) -> Table | None:
    """What was scored highest and lowest at the last choice, as text; None where the run did not write it, or where all
    scores are alike, as those of the random selector.

    Raises:
        InputError: the file is malformed.
    """
    paths = sorted((run.folder / "selections").glob("step_*.jsonl"))
    if not paths:
        return None
    records = read_jsonl(paths[-1])
    rows, ranks = [], {}
    for number, record in enumerate(records, start=1):
        end, score, text = record.get("end"), record.get("score"), record.get("text")
        if not (isinstance(end, str) and isinstance(score, int | float) and isinstance(text, str)):
            raise InputError(f"{paths[-1]}:{number}: `end`, `score` and `text` of a candidate are expected")
        ranks[end] = ranks.get(end, 0) + 1
        chosen = "yes" if record.get("chosen") else "no"
        length, domain = text_of(record.get("length")), text_of(record.get("domain"))
        cells = (f"{score:.4g}", domain, length, chosen, _CONTROLS.sub("�", text))
        rows.append((f"{end} {ranks[end]}", list(map(Cell, cells))))
    if len({record["score"] for record in records}) < 2:
        return None
    step = int(paths[-1].stem.removeprefix("step_"))
    title = f"Highest and lowest scored after step {step}"
    return Table(title, ["score", "domain", "length", "chosen", "text"], rows, words=True)


def _percent(share: Any) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"


def _pool_mean(chosen: Selection) -> float:
    return float(np.average(chosen.pool_lengths, weights=chosen.pool_rows))
