"""The results of groups, recomputed from the run folders' own files with NumPy and SciPy."""

import json

import numpy as np
import pytest
from scipy import stats

from dataflex_jax.reporting.groups import grouped
from dataflex_jax.reporting.results import difference_table, results_table
from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.tables import differences, evaluation_tables, overview
from tests.helpers.synthetic_run import write_run

NAMES = ("books", "code", "web")


def edit(folder, file, change):
    """Has `change` alter every record of a file of lines."""
    path = folder / f"{file}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_group(root, name, seeds, offset, evaluator="mmlu", sd=0.01):
    """Runs with losses that differ by seed and domain, in folders `name`/seedN."""
    for seed in seeds:
        rng = np.random.default_rng([seed, int(1000 * (1 + offset))])
        folder = write_run(
            root / name / f"seed{seed}", steps=10, seed=seed, offset=offset + 0.1 * seed, evaluator=evaluator
        )
        noise = rng.normal(0, sd, 8)

        def change(record, noise=noise):
            for shift, scores in zip(noise, [record["overall"], *record["domains"].values()], strict=False):
                scores |= {key: value + shift for key, value in scores.items() if key in ("nll", "accuracy")}

        edit(folder, "eval", change)
        config = json.loads((folder / "config.json").read_text())
        config["config"]["mixer"]["name"] = name
        (folder / "config.json").write_text(json.dumps(config))
        yield f"{name}/seed{seed}", folder


def groups_of(root, *specs, **options):
    folders = dict(item for spec in specs for item in write_group(root, *spec, **options))
    return grouped({name: RunRecords.load(folder) for name, folder in folders.items()}), folders


def last(folder, split="valid"):
    records = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split][-1]


def by_hand(folder):
    domains = {name: scores["nll"] for name, scores in last(folder)["domains"].items()}
    of_evaluator = last(folder, "mmlu")["overall"]
    return {
        "overall": last(folder)["overall"]["nll"],
        "average domain": sum(domains.values()) / len(domains),
        "worst domain": max(domains.values()),
        **domains,
        "mmlu: accuracy": of_evaluator["accuracy"],
        "mmlu: length": of_evaluator["length"],
    }


def numbers(text):
    return [
        float(part) for part in text.replace("±", " ").replace("[", " ").replace("]", " ").replace(",", " ").split()
    ]


def test_every_figure_is_the_run_folders(tmp_path):
    groups, folders = groups_of(tmp_path, ("static", (0, 1, 2), 0.0), ("odm", (0, 1, 2), -0.05))
    assert list(groups) == ["static", "odm"]
    of = {name: [by_hand(f) for n, f in folders.items() if n.startswith(name)] for name in groups}
    table = results_table(groups)
    assert table.columns == ["runs", "overall", "average domain", "worst domain", "mmlu: accuracy", "mmlu: length"]
    for name, (runs, *cells) in table.rows:
        assert runs.text == "3"
        for column, cell in zip(table.columns[1:], cells, strict=True):
            values = [run[column] for run in of[name]]
            precise = {"rtol": 5e-3} if column == "mmlu: length" else {"atol": 5.1e-5}
            np.testing.assert_allclose(numbers(cell.text)[0], np.mean(values), **precise)
            np.testing.assert_allclose(numbers(cell.text)[1], np.std(values, ddof=1), **{"atol": 5.1e-4} | precise)
    table = difference_table(groups)
    assert [head for head, _ in table.rows] == [*of["odm"][0], "interval"]
    for head, (cell,) in table.rows[:-1]:
        ours, theirs = ([run[head] for run in of[name]] for name in ("odm", "static"))
        low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        np.testing.assert_allclose(
            numbers(cell.text), [np.mean(ours) - np.mean(theirs), low, high], rtol=2e-3, atol=5.1e-5
        )
        better = high < 0 if head in ("overall", "average domain", "worst domain", *NAMES) else low > 0
        worse = low > 0 if head in ("overall", "average domain", "worst domain", *NAMES) else high < 0
        known = head != "mmlu: length"
        assert (cell.best, cell.worse) == (known and better, known and worse)
    assert table.rows[-1][1][0].text == "paired, n = 3"


def test_seeds_that_are_not_shared_are_compared_as_two_samples(tmp_path):
    groups, folders = groups_of(tmp_path, ("static", (0, 1, 2), 0.0), ("odm", (5, 6), -0.05))
    ours, theirs = ([by_hand(f)["overall"] for n, f in folders.items() if n.startswith(g)] for g in ("odm", "static"))
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    table = difference_table(groups)
    np.testing.assert_allclose(numbers(table.rows[0][1][0].text)[1:], [low, high], atol=5.1e-5)
    assert table.rows[-1][1][0].text == "Welch, n = 2 and 3"


@pytest.mark.parametrize(("sd", "marked"), [(1e-6, True), (1.0, False)])
def test_the_best_is_marked_where_chance_is_ruled_out(tmp_path, sd, marked):
    groups, _ = groups_of(
        tmp_path, ("static", (0, 1, 2), 0.0), ("odm", (0, 1, 2), -0.05), ("ado", (0, 1, 2), 0.1), sd=sd
    )
    best = {name: [cell.best for cell in cells[1:4]] for name, cells in results_table(groups).rows}
    assert best == {"static": [False] * 3, "odm": [marked] * 3, "ado": [False] * 3}
    (table, _) = evaluation_tables(groups)
    assert [cell.best for cell in dict(table.rows)["overall"][:3]] == [False, marked, False]


def test_a_single_run_beside_groups_has_no_spread_and_wins_nothing(tmp_path):
    groups, folders = groups_of(tmp_path, ("static", (0, 1), 0.0), ("odm", (0,), -0.5), sd=1e-6)
    assert list(groups) == ["static", "odm/seed0"]
    rows = dict(results_table(groups).rows)
    assert rows["odm/seed0"][1].text == f"{by_hand(folders['odm/seed0'])['overall']:.4f}"
    assert not any(cell.best for cells in rows.values() for cell in cells)
    table = difference_table(groups)
    assert "[" not in table.rows[0][1][0].text
    assert table.rows[-1][1][0].text == "none, n = 1 and 2"


def test_a_run_that_stopped_early_is_pointed_out(tmp_path):
    groups, folders = groups_of(tmp_path, ("static", (0, 1), 0.0), ("odm", (0, 1), 0.1))
    assert len(results_table(groups).notes) == 1
    path = folders["odm/seed1"] / "eval.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    groups = grouped({name: RunRecords.load(folder) for name, folder in folders.items()})
    table = results_table(groups)
    assert table.notes[1].startswith("The last evaluations were not at the same step (static: 10; odm: 5, 10)")
    assert dict(table.rows)["odm"][4].text.endswith("(n = 1)")


def test_other_domains_and_other_tokenizers_are_not_compared(tmp_path):
    _, folders = groups_of(tmp_path, ("static", (0, 1), 0.0), ("odm", (0, 1), 0.1), evaluator=None)
    folder = folders["odm/seed0"]
    edit(folder, "eval", lambda record: record["domains"].pop("web"))
    config = json.loads((folder / "config.json").read_text())
    config["config"]["data"]["tokenizer"] = "another"
    (folder / "config.json").write_text(json.dumps(config))
    runs = {name: RunRecords.load(folder) for name, folder in folders.items()}
    table = difference_table(grouped(runs, ["mixer.name"]))
    assert [head for head, _ in table.rows] == [*NAMES, "interval"]
    assert table.corner == "held-out bits/byte"
    ours, theirs = (
        [last(folders[f"{g}/seed{s}"])["domains"]["books"]["bits_per_byte"] for s in (0, 1)] for g in ("odm", "static")
    )
    np.testing.assert_allclose(numbers(table.rows[0][1][0].text)[0], np.mean(ours) - np.mean(theirs), atol=5.1e-5)


def test_the_overview_and_what_differs_are_of_groups(tmp_path):
    groups, _ = groups_of(tmp_path, ("static", (0, 1), 0.0), ("odm", (0, 1), 0.1))
    rows = {head: [cell.text for cell in cells] for head, cells in overview(groups).rows}
    assert rows["runs"] == ["2", "2"]
    assert rows["last step"] == ["10", "10"]
    # Ten steps of a minute have nine minutes between the first and the last.
    assert rows["hours"] == ["0.15 ± 0.00"] * 2
    rows = {head: [cell.text for cell in cells] for head, cells in differences(groups).rows}
    assert rows == {"seed": ["0, 1", "0, 1"], "mixer.name": ["static", "odm"]}


def test_single_runs_have_no_table_of_groups(tmp_path):
    groups, _ = groups_of(tmp_path, ("static", (0,), 0.0), ("odm", (1,), 0.1))
    assert results_table(groups) is None
    assert difference_table(groups) is None


def test_a_difference_that_is_shown_as_zero_is_no_difference(tmp_path):
    _, folders = groups_of(tmp_path, ("static", (0, 1), 0.0), ("odm", (0, 1), 0.0), sd=0.0, evaluator=None)
    edit(folders["odm/seed0"], "eval", lambda record: record["overall"].update(nll=record["overall"]["nll"] - 1e-9))
    edit(folders["odm/seed1"], "eval", lambda record: record["overall"].update(nll=record["overall"]["nll"] - 1e-9))
    runs = {name: RunRecords.load(folder) for name, folder in folders.items()}
    groups = grouped(runs)
    (cell,) = difference_table(groups).rows[0][1]
    assert not cell.best
    assert not cell.worse
    assert not any(cell.best for _, cells in results_table(groups).rows for cell in cells)
