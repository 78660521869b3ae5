"""What the report says of selections, recomputed from their files."""

import csv
import io
import json

import numpy as np
import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.selection_plots import length_histogram_figure, overlaps_figure, score_histograms_figure
from dataflex_jax.reporting.selections import examples_table, selection_paths, selections_table
from tests.helpers.synthetic_run import write_run, write_selections


@pytest.fixture
def chosen(tmp_path):
    """(folder, step -> arrays)."""
    folder = write_run(tmp_path / "run", steps=20, mixer=False)
    return folder, write_selections(folder)


def points(figure):
    """(plot, curve) -> [(x, value)] of a figure's CSV."""
    found = {}
    for row in csv.DictReader(io.StringIO(figure.csv())):
        found.setdefault((row["plot"], row["curve"]), []).append((float(row["x"]), float(row["value"])))
    return found


def test_a_line_a_choice(chosen):
    folder, arrays = chosen
    rows = {head: [cell.text for cell in cells] for head, cells in selections_table(RunRecords.load(folder)).rows}
    assert list(rows) == ["5", "10", "15"]
    lines = {line["step"]: line for line in map(json.loads, (folder / "policy.jsonl").read_text().splitlines())}
    for head, cells in rows.items():
        of = arrays[int(head)]
        pool = 10 + np.arange(60) % 50
        coverage, overlap = (lines[int(head)][field] for field in ("coverage", "overlap"))
        assert cells == [
            "12",
            "12",
            f"{100 * coverage:.1f} %",
            "—" if overlap is None else f"{100 * overlap:.1f} %",
            f"{np.mean(pool[of['ids']]):.1f}",
            f"{np.mean(pool):.1f}",
            *(f"{value:.4g}" for value in (of["scores"].min(), of["scores"].mean(dtype=float), of["scores"].max())),
        ]


def test_histograms_are_shares_of_candidates_and_chosen(chosen):
    folder, arrays = chosen
    run = RunRecords.load(folder)
    scores = points(score_histograms_figure(run))
    lengths = points(length_histogram_figure(run))
    for step, of in arrays.items():
        finite = of["all_scores"][np.isfinite(of["all_scores"])].astype(float)
        edges = np.linspace(finite.min(), finite.max(), 41)
        for name, values in (("candidates", finite), ("chosen", of["scores"])):
            x, shares = np.array(scores[f"after step {step}", name]).T
            np.testing.assert_allclose(x, (edges[1:] + edges[:-1]) / 2)
            np.testing.assert_allclose(shares, np.histogram(values, edges)[0] / len(values))
        _, shares = np.array(lengths["share of the rows", f"chosen after step {step}"]).T
        np.testing.assert_allclose(shares, np.histogram(of["lengths"], 20, (10, 59))[0] / 12)
    _, shares = np.array(lengths["share of the rows", "candidates"]).T
    np.testing.assert_allclose(shares, np.histogram(10 + np.arange(60) % 50, 20, (10, 59))[0] / 60)


def test_the_overlap_of_every_two_choices(chosen):
    folder, arrays = chosen
    found = points(overlaps_figure(RunRecords.load(folder)))
    sets = {step: set(of["ids"].tolist()) for step, of in arrays.items()}
    for step, ours in sets.items():
        expected = [(other, len(ours & theirs) / len(ours)) for other, theirs in sets.items()]
        assert found["rows of the choice after step", f"after step {step}"] == expected


def test_what_was_scored_highest_and_lowest_is_shown_as_text(chosen):
    folder, arrays = chosen
    table = examples_table(RunRecords.load(folder))
    assert table.title == "Highest and lowest scored after step 15"
    scores = arrays[15]["all_scores"]
    ranked = [i for i in np.argsort(scores) if np.isfinite(scores[i])]
    shown = [(head, cells[0].text, cells[4].text) for head, cells in table.rows]
    assert shown == [
        (f"{end} {rank}", f"{scores[i]:.4g}", f"<b>row {i}</b> of\nsome text")
        for end, ids in (("highest", ranked[::-1][:10]), ("lowest", ranked[:10]))
        for rank, i in enumerate(ids, start=1)
    ]
    path = folder / "selections" / "step_00000015.jsonl"
    line = '{"end": "highest", "score": 1.0, "text": "a\\u0000\\u001bb\\u202e"}\n'
    path.write_text(line + line.replace("1.0", "0.5"))
    assert examples_table(RunRecords.load(folder)).rows[0][1][4].text == "a��b\u202e"


def test_earlier_versions_files_have_no_lengths_and_all_scores_may_be_missing(chosen):
    folder, arrays = chosen
    for step, of in arrays.items():
        path = folder / "selections" / f"step_{step:08d}.npz"
        np.savez(path, ids=of["ids"], scores=of["scores"], domains=of["domains"])
        path.with_suffix(".jsonl").unlink()
    run = RunRecords.load(folder)
    assert length_histogram_figure(run) is None
    assert examples_table(run) is None
    assert {curve for _, curve in points(score_histograms_figure(run))} == {"chosen"}
    assert [cells[4].text for _, cells in selections_table(run).rows] == ["—"] * 3


def test_a_run_without_selections_has_none(tmp_path):
    run = RunRecords.load(write_run(tmp_path / "run", steps=2))
    assert [selections_table(run), examples_table(run)] == [None, None]
    assert [draw(run) for draw in (score_histograms_figure, length_histogram_figure, overlaps_figure)] == [None] * 3


def test_of_many_choices_evenly_spaced_ones_are_shown(tmp_path):
    (tmp_path / "run" / "selections").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for name in (*(f"step_{step:08d}" for step in range(100)), "mine", "step_best"):
        (tmp_path / "run" / "selections" / f"{name}.npz").touch()
    paths = selection_paths(RunRecords.load(tmp_path / "run"), 4)
    assert [path.stem for path in paths] == [f"step_{step:08d}" for step in (0, 33, 66, 99)]


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_damaged_file_is_named(chosen, contents):
    folder, _ = chosen
    (folder / "selections" / "step_00000010.npz").write_bytes(contents)
    with pytest.raises(InputError, match=r"step_00000010\.npz: cannot be read; the \.npz file that a run writes"):
        selections_table(RunRecords.load(folder))


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": [1, 2]},
        {"ids": [1, 2], "scores": [1.0]},
        {"ids": [], "scores": []},
        {"ids": ["a"], "scores": ["b"]},
        {"ids": [1], "scores": [1.0], "lengths": [3]},
        {"ids": [1], "scores": [1.0], "lengths": [3], "pool_lengths": [3, 4], "pool_rows": [5]},
        {"ids": [1], "scores": [1.0], "all_scores": [[1.0]]},
    ],
)
def test_a_file_of_something_else_is_named(chosen, arrays):
    folder, _ = chosen
    np.savez(folder / "selections" / "step_00000010.npz", **arrays)
    with pytest.raises(InputError, match=r"step_00000010\.npz: not a selection; arrays `ids` and `scores`"):
        selections_table(RunRecords.load(folder))


def test_a_damaged_line_is_named(chosen):
    folder, _ = chosen
    (folder / "selections" / "step_00000015.jsonl").write_text('{"end": "highest", "score": "x", "text": ""}\n')
    with pytest.raises(InputError, match=r"step_00000015\.jsonl:1: `end`, `score` and `text` of a candidate"):
        examples_table(RunRecords.load(folder))


def test_scores_that_are_all_alike_are_not_shown(chosen):
    folder, arrays = chosen
    for step, of in arrays.items():
        path = folder / "selections" / f"step_{step:08d}.npz"
        np.savez(path, **of | {"scores": 0 * of["scores"], "all_scores": np.zeros(60, np.float32)})
        lines = map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())
        path.with_suffix(".jsonl").write_text("".join(json.dumps(line | {"score": 0.0}) + "\n" for line in lines))
    run = RunRecords.load(folder)
    assert score_histograms_figure(run) is None
    assert examples_table(run) is None
    assert length_histogram_figure(run) is not None
