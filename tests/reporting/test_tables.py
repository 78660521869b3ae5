"""The tables of the page, without the page."""

import json
import math

from dataflex_jax.reporting.run_folder import RunRecords
from dataflex_jax.reporting.tables import evaluation_tables, highlights, overview
from tests.helpers.synthetic_run import write_run


def loaded(*folders) -> dict[str, list[RunRecords]]:
    return {folder.name: [RunRecords.load(folder)] for folder in folders}


def with_data(folder, **fields):
    """The run with fields of its `config.data` set otherwise."""
    config = json.loads((folder / "config.json").read_text())
    config["config"]["data"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_of_runs_that_differ_in_the_seed_alone_none_is_the_best(tmp_path):
    seeds = [write_run(tmp_path / f"seed{i}", seed=i, offset=i / 10) for i in range(2)]
    (table,) = evaluation_tables(loaded(*seeds))
    assert [head for head, _ in table.rows] == ["books", "code", "web", "overall"]
    assert not any(cell.best for _, cells in table.rows for cell in cells)
    assert not any("bold" in note for note in table.notes)
    assert table.notes[0].startswith("seed0, seed1 differ in the seed alone: ")
    other = with_data(write_run(tmp_path / "other", offset=-0.1), seq_len=64)
    (table,) = evaluation_tables(loaded(*seeds, other))
    assert [cell.best for cell in table.rows[0][1]] == [False, False, True] * 3
    assert table.notes[-1] == "The best of each row is bold."
    assert table.notes[0].startswith("seed0, seed1 differ in the seed alone: ")


def test_the_length_of_the_rows_that_the_data_have_is_shown(tmp_path):
    documents = with_data(write_run(tmp_path / "documents"), cutoff_len=2048)
    examples = with_data(write_run(tmp_path / "examples"), cutoff_len=512, formatting="alpaca")
    listed = with_data(write_run(tmp_path / "listed"), cutoff_len=256, source="dataset_info", formatting=None)
    shown = [
        {name: text for name, text in highlights([RunRecords.load(run)]) if name.endswith("_len")}
        for run in (documents, examples, listed)
    ]
    assert shown == [{"data.seq_len": "128"}, {"data.cutoff_len": "512"}, {"data.cutoff_len": "256"}]


def test_a_perplexity_in_the_thousands_has_no_dot_at_its_end(tmp_path):
    (table,) = evaluation_tables(loaded(write_run(tmp_path / "run", steps=5, offset=4.05)))
    assert table.rows[0][1][1].text == f"{math.exp(6.05 + 6 * math.exp(-1)):.0f}"


def test_the_throughput_is_the_median_of_the_whole_run(tmp_path):
    folder = write_run(tmp_path / "run", mixer=False, steps=9)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["tokens_per_second"] = 7.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = dict(overview(loaded(folder)).rows)
    assert cells["tokens/s, median"][0].text == "50,000"
